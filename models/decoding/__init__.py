"""Decoding: generation, beam search and scoring by any model that has ``decode``.

generate      greedy and sampling, settings of its own for every row
make          the same with its compiled programs in hand
beam_search   the n best continuations
score         log probabilities of given continuations; ``option_scores`` for choices
streams       several models in step, as one model
processors    functions ``(state, logits) -> (state, logits)``
"""

from steppe.models.decoding import processors, sampling
from steppe.models.decoding.beam import Beams, beam_search
from steppe.models.decoding.generate import Generated, Generator, generate, make, shared
from steppe.models.decoding.processors import Processor, Start, chain
from steppe.models.decoding.prompts import bucket, pad_prompts, rows_bucket
from steppe.models.decoding.score import Scores, option_scores, score
from steppe.models.decoding.settings import Rows, Settings
from steppe.models.decoding.stops import TextStream
from steppe.models.decoding.streams import Streams, streams

__all__ = [
    "Beams",
    "Generated",
    "Generator",
    "Processor",
    "Rows",
    "Scores",
    "Settings",
    "Start",
    "Streams",
    "TextStream",
    "beam_search",
    "bucket",
    "chain",
    "generate",
    "make",
    "option_scores",
    "pad_prompts",
    "processors",
    "rows_bucket",
    "sampling",
    "score",
    "shared",
    "streams",
]
