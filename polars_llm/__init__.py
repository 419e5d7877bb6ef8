"""LLMs over Polars columns: one offline batch job per column, never paid for twice.

>>> import polars as pl
>>> import polars_llm as pllm  # registers .llm on DataFrame, LazyFrame, Expr and Series
"""

from __future__ import annotations

from polars_llm.config import Config
from polars_llm.errors import (
    AccountError,
    BudgetExceeded,
    CacheCorrupt,
    CacheError,
    CacheUnsafe,
    InvalidRequest,
    JobsPending,
    LLMWarning,
    ModelNotChosen,
    PolarsLLMError,
    ProviderError,
    RequestsFailed,
    UnansweredInput,
)
from polars_llm.frame.engine import Engine
from polars_llm.local import VLLM
from polars_llm.models import Anthropic, OpenAI
from polars_llm.namespace import register
from polars_llm.operate import abandon, cancel, jobs, recover, results
from polars_llm.pricing import Prices
from polars_llm.ray_cluster import RayVLLM

__all__ = [
    "VLLM",
    "AccountError",
    "Anthropic",
    "BudgetExceeded",
    "CacheCorrupt",
    "CacheError",
    "CacheUnsafe",
    "Config",
    "Engine",
    "InvalidRequest",
    "JobsPending",
    "LLMWarning",
    "ModelNotChosen",
    "OpenAI",
    "PolarsLLMError",
    "Prices",
    "ProviderError",
    "RayVLLM",
    "RequestsFailed",
    "UnansweredInput",
    "abandon",
    "cancel",
    "jobs",
    "recover",
    "results",
]

register()
