"""The Multi-gRain Benchmark: who names the grains of a query, who checks them, and how it is given away."""
