"""What should we run, and how sure are we? Enumeration, bounds, search over the simulator."""

from planner.plan import Plan, Pool
from planner.question import Question
from planner.search import SearchResult, search

__all__ = ["Plan", "Pool", "Question", "SearchResult", "search"]
