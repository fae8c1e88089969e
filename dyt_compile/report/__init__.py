"""The report of a conversion: records, and how a terminal shows them."""

from .records import Report, SiteReport, environment

__all__ = ["Report", "SiteReport", "environment"]
