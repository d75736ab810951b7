"""Tests of `detr_exp.data`; a package because they share helpers and a file name with other folders."""
