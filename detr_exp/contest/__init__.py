"""The proof suite: detectors of this project and of others, trained on the same images with the same budget.

`sets` prepares the data, `cells` trains and records, `scores` evaluates result files, `page` compares and writes. The
programs that train run in processes of their own, and know only a `job`.
"""
