"""What a run leaves for people to read: its numbers, a verdict, pictures, and one HTML page.

summary      result.json, the closing table, and the two commands' work
data         a run's folder as everything here reads it
verdict      is FP8 safe for this run; the checks behind it are in check and checks_*
gains        what FP8 bought, and what it cost
comparison   several runs as arms of seeds; quantities is what they are compared by
page         the kit that pages are made of; figures puts pictures into them
run_page, comparison_page   the pages; curves and overlay are their pictures
equivalence  is an arm as good as its baseline: the rule of comparisons and of studies
statistics, words, glossary   tests and intervals; names and numbers as text; what metrics mean
"""
