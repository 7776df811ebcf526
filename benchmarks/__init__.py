"""What `bench.py` measures, one file each, and the studies behind the documents.

Left empty on purpose: env workers of an emulated run import `benchmarks.emulated`, and nothing else
of this package should come along.
"""
