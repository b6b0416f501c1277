"""Running it: command line, recipes, reports, benchmarks."""
