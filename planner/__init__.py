"""What should we run, and how sure are we? Enumeration, bounds, search over the simulator."""

from planner.families import answer as search
from planner.plan import Plan, Pool
from planner.question import Question
from planner.search import SearchResult

__all__ = ["Plan", "Pool", "Question", "SearchResult", "search"]
