"""What came of asking a chat model about latents: explanations, scores, averages, cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from routesae_cache.interpretation.prices import Usage, cost_usd
from routesae_cache.interpretation.prompts import CATEGORIES, Explanation
from routesae_cache.interpretation.replies import Outcome, Status

Level = Literal["low-level", "high-level"]
LEVELS: tuple[Level, ...] = ("low-level", "high-level")


@dataclass(frozen=True, kw_only=True)
class Average:
    """A mean over latents."""

    count: int
    mean: float | None
    """None over no latents."""
    se: float | None
    """Standard error, from the sample's standard deviation; None over fewer than two."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Average:
        """Over these values."""
        se = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(count=len(values), mean=fmean(values) if values else None, se=se)

    def to_dict(self) -> dict[str, Any]:
        """Mean and standard error, as JSON has them."""
        return {"mean": self.mean, "se": self.se}


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well an explanation tells a latent's held-out contexts from those of others."""

    balanced_accuracy: float
    """Mean of the shares recognised among its own and among the others; 0.5 by guessing."""
    asked: int
    """Contexts."""

    @classmethod
    def of(cls, said: Sequence[int], own: frozenset[int], contexts: int) -> Detection:
        """From the numbers said to match and those that do, of so many contexts."""
        hits = len(own.intersection(said))
        false = len(said) - hits
        others = contexts - len(own)
        accuracy = (hits / len(own) + (others - false) / others) / 2
        return cls(balanced_accuracy=accuracy, asked=contexts)


Undetected = Literal["too_few_contexts", "no_explanation", "unparsed", "refused", "failed", "left"]


@dataclass(frozen=True, kw_only=True)
class LatentResult:
    """What came of a latent."""

    latent: int
    explanation: Outcome
    detection: Detection | None = None
    undetected: Undetected | None = None
    """Why there is no detection, where one was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; for latents with an explanation."""
        answer = self.explanation.answer
        assert isinstance(answer, Explanation)
        detection = self.detection
        return {
            "category": CATEGORIES[answer.category],
            "subcategory": answer.category,
            "score": answer.score,
            "explanation": answer.text,
            "detection": detection
            and {"balanced_accuracy": detection.balanced_accuracy, "asked": detection.asked},
        }


@dataclass(frozen=True, kw_only=True)
class Interpretation:
    """The result of a run, and of the ones before it that it goes on with."""

    contexts: Path
    """The file that the contexts are from."""
    name: str
    """Of the run that they are of."""
    interpretable: int
    """Latents in the file."""
    model: str
    seed: int
    latents: tuple[LatentResult, ...]
    """The sample."""
    usage: Usage
    """Of every reply that counts here, those of earlier runs included."""
    usage_complete: bool
    """False where the server left it out of a reply."""
    interrupted: bool
    """Whether it was asked to stop."""

    @property
    def cost_usd(self) -> float | None:
        """None for a model without a known price, or where usage is not complete."""
        return cost_usd(self.model, self.usage) if self.usage_complete else None

    def with_status(self, status: Status) -> list[LatentResult]:
        """Latents whose explanation came out like this."""
        return [result for result in self.latents if result.explanation.status == status]

    @property
    def asked(self) -> int:
        """Latents that a reply came for."""
        return sum(len(self.with_status(status)) for status in ("parsed", "unparsed", "refused"))

    def explained(self) -> Iterator[tuple[LatentResult, Explanation]]:
        """Latents with an explanation."""
        for result in self.latents:
            if isinstance(result.explanation.answer, Explanation):
                yield result, result.explanation.answer

    def score(self, level: Level | None = None) -> Average:
        """Of the scores from 1 to 5, over one level or over all, the undiscernible included."""
        found = [e.score for _, e in self.explained() if level in (None, CATEGORIES[e.category])]
        return Average.of(found)

    def categories(self) -> dict[str, int]:
        """How many latents are of each category."""
        found = Counter(CATEGORIES[e.category] for _, e in self.explained())
        return {category: found[category] for category in dict.fromkeys(CATEGORIES.values())}

    @property
    def tested(self) -> bool:
        """Whether detection was asked for."""
        return any(result.detection or result.undetected for result in self.latents)

    def detection(self) -> Average:
        """Balanced accuracy, over the latents that have one."""
        scores = [result.detection for result in self.latents if result.detection]
        return Average.of([score.balanced_accuracy for score in scores])

    def undetected(self) -> dict[str, int]:
        """Why latents have no detection, with how many."""
        return dict(Counter(r.undetected for r in self.latents if r.undetected))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        detection = self.detection()
        averages = {"all": self.score()} | {str(level): self.score(level) for level in LEVELS}
        return {
            "kind": "interpretation",
            "contexts": str(self.contexts),
            "name": self.name,
            "model": self.model,
            "seed": self.seed,
            "interpretable": self.interpretable,
            "sample": len(self.latents),
            "asked": self.asked,
            **{
                status: len(self.with_status(status))
                for status in ("parsed", "unparsed", "refused", "failed", "left")
            },
            "averages": {
                name: {"count": average.count, "score": average.to_dict()}
                for name, average in averages.items()
            },
            "categories": self.categories(),
            "detection": {
                "latents": detection.count,
                "balanced_accuracy": detection.to_dict(),
                "not_scored": self.undetected(),
            }
            if self.tested
            else None,
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
                "cost_usd": self.cost_usd,
            },
            "latents": {str(result.latent): result.to_dict() for result, _ in self.explained()},
        }
