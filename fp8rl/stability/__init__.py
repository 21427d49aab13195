"""Is FP8 safe to train with? Arms x seeds of the real loop, and a verdict for each arm.

config      the study: what all arms share, what each changes, against which it is held
plan        the runs of a study, each a folder; what has ended, failed, or waits
lane        a process that does runs in turn, with an engine that it keeps where it fits
execute     lanes side by side until every run has ended; progress; Ctrl-C
measure     the numbers of one run
collapse    has a run collapsed, when, and what was out of bounds before
claims      the paper's claims beside what was measured
result, picture, page, command   what is written and printed

An arm is held against its baseline by ``report/equivalence.py``: same, worse, better or undecided.
"""
