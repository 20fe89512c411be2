"""A report of a run: one page that a browser opens, with every slide, its pictures and its numbers."""

from slide2vec.report.writing_report import WrittenReport, write_report

__all__ = ["WrittenReport", "write_report"]
