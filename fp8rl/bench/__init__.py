"""Benchmarks: `fp8rl bench ...`. Every figure is measured beside its alternatives, in one run.

timing.py measures, result.py keeps and prints, command.py is the command line; each subject has a
file (quant.py) and where needed its rivals' (quant_rivals.py) and its picture (quant_plot.py).
Left out: anything that passes or fails; a benchmark reports ratios beside its goals.
"""
