"""Data sets on disk: M-BEIR's format, images, clips, the emoji collection, the sets of Tables 2 and 7."""
