"""The Multi-gRain Benchmark: annotation of grains, construction, verification by people, data card."""
