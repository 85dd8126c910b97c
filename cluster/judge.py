"""Scores by a model that answers yes or no, as generative rerankers do (Qwen3-Reranker).

A template makes a prompt of a query and a document; the score is how likely the model is to say yes
rather than no, from the two tokens' logits. Both are asked for as an answer that begins with that
token, so all that it takes is one token's log-probability each, over a prompt that is shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tensorray.cluster.bodies import all_of
from tensorray.cluster.chat import ChatTemplate
from tensorray.cluster.frontend import EngineClient, Frontend, PreparedRequest
from tensorray.cluster.outputs import RequestOutput
from tensorray.cluster.sampling_params import SamplingParams


class Judge:
    """Judges how well documents meet queries."""

    def __init__(self, frontend: Frontend, template: str, answers: Sequence[str]) -> None:
        """`template` is a jinja file, or a template itself, over `query` and `document`; `answers`
        are the texts of yes and no. Raises ValueError for what can't judge with this model."""
        if len(answers) != 2:
            raise ValueError(f"--score-tokens: two are needed, yes and no, not {len(answers)}")
        self._frontend = frontend
        self._template = ChatTemplate(frontend.tokenizer, template)
        self._answers = []
        for answer in answers:
            tokens = frontend.tokenizer.encode(answer, add_special_tokens=False, continues=True)
            if len(tokens) != 1:
                raise ValueError(
                    f"--score-tokens {answer}: it is {len(tokens)} tokens of this model, not one"
                )
            self._answers.append(
                SamplingParams(temperature=0, max_tokens=1, logprobs=0, forced_prefix=tokens)
            )

    def prepare(
        self, query: str, document: str, *, request_id: str, **routing: Any
    ) -> list[PreparedRequest]:
        """What to ask of a pair of texts; `routing` as `Frontend.request` has it.

        Raises BadRequest.
        """
        prompt = self._template.encode(
            [{"role": "user", "content": query}], query=query, document=document
        )
        return [
            self._frontend.request(prompt, params, request_id=f"{request_id}-{i}", **routing)
            for i, params in enumerate(self._answers)
        ]

    async def score(
        self, client: EngineClient, asked: Sequence[PreparedRequest]
    ) -> tuple[float, int]:
        """The probability of yes against no, and the tokens of the prompt."""
        yes, no = await all_of([self._frontend.collect(client, each) for each in asked])
        score = 1 / (1 + math.exp(min(_logprob(no) - _logprob(yes), 700.0)))
        return score, len(yes.prompt_token_ids)


def _logprob(answer: RequestOutput) -> float:
    logprob = answer.outputs[0].cumulative_logprob
    assert logprob is not None
    return max(logprob, -1e4)  # of a token that the model excludes: minus infinity
