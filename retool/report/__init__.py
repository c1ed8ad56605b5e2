"""`python -m retool.report RUN_DIR …`: one self-contained page about one run or several.

See `retool.report.page`.
"""
