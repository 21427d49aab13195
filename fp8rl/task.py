"""A verifiable task made by the program: reverse, sort or add up short digit strings.

A prompt is an operation letter, digits and ``=``; the one right response is the answer and EOS:

    ``R38152=`` -> ``25183``    ``S38152=`` -> ``12358``    ``A381+52=`` -> ``433``

Reward is a rule: 1.0 if the response is exactly the answer followed by EOS, else 0.0. There is no
partial credit, so a rising reward cannot come from anything but more right answers.

A prompt is held out if the hash of its text says so (one in eight), whatever the seed, step or
run: training never meets a held-out prompt, also after a resume. Training prompts are a function
of (seed, step) alone, so a resumed run sees what the unbroken one would have seen. The evaluated
held-out prompts do not depend on the seed: all arms and seeds answer the same questions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

from fp8rl.config.model import VOCAB_MULTIPLE
from fp8rl.config.run import TaskConfig
from fp8rl.errors import ConfigError

TokenIds = tuple[int, ...]

HELD_OUT_SHARE = 8  # one prompt in so many is held out
MAX_DRAWS = 1000  # for each held-out prompt, in prompt spaces so small that the hash misses

_CHARACTERS = "0123456789=+RSA"
_LETTERS = {"reverse": "R", "sort": "S", "sum": "A"}
_ANSWERS: dict[str, Callable[[str], str]] = {
    "R": lambda body: body[::-1],
    "S": lambda body: "".join(sorted(body)),
    "A": lambda body: str(sum(int(number) for number in body.split("+"))),
}


class DigitTask:
    """Prompts, answers and rewards of one run.

    Attributes:
        pad_id: Token id that fills up short rows; never part of a prompt or an answer.
        eos_id: Token id that ends a response.
        vocab_size: Number of token ids, padded to a multiple of 64.
        max_prompt_tokens: Tokens of the longest prompt.
        max_response_tokens: Tokens of the longest right response, EOS included.
    """

    pad_id = 0
    eos_id = 1

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Draw the held-out prompts.

        Args:
            config: Operations, operand lengths and number of held-out prompts.
            seed: Of the training and warm-up prompts.

        Raises:
            ConfigError: there are too few prompts to hold out as many as asked.
        """
        self._config = config
        self._seed = seed
        self._ids = {character: id for id, character in enumerate(_CHARACTERS, start=2)}
        self._characters = {id: character for character, id in self._ids.items()}
        used = len(_CHARACTERS) + 2
        self.vocab_size = -(-used // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        adds = "sum" in config.operations
        digits = config.max_digits
        self.max_prompt_tokens = (2 * digits + 1 if adds else digits) + 2
        self.max_response_tokens = digits + 1 + adds
        self._heldout = self._draw_heldout()

    def heldout_prompts(self) -> list[TokenIds]:
        """Distinct prompts that are never trained on; the same for every seed."""
        return list(self._heldout)

    def train_prompts(self, step: int, count: int) -> list[TokenIds]:
        """The ``count`` prompts of RL step ``step``: a function of (seed, step, count) alone."""
        return self._draw_train("train", step, count)

    def demonstrations(
        self, step: int, count: int, slip_rate: float
    ) -> list[tuple[TokenIds, TokenIds]]:
        """Examples of warm-up step ``step``: (prompt, response with EOS), none held out.

        Each digit of a response is wrong with probability ``slip_rate``, so that a model that
        imitates them knows the task and errs as often: reward is low, and RL has something to find.
        """
        rng = random.Random(f"slips/{self._seed}/{step}")
        return [
            (prompt, tuple(self._slip(id, slip_rate, rng) for id in self.answer(prompt)))
            for prompt in self._draw_train("warmup", step, count)
        ]

    def answer(self, prompt: Sequence[int]) -> TokenIds:
        """The one response that earns a reward, EOS included.

        Raises:
            ValueError: ``prompt`` is not a prompt of this task.
        """
        text = self.decode(prompt)
        solve = _ANSWERS.get(text[:1])
        if solve is None or not text.endswith("="):
            raise ValueError(f"{text!r} is not a prompt: expected a letter of RSA, digits and '='")
        return (*self._encode(solve(text[1:-1])), self.eos_id)

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """1.0 if ``response`` is exactly the answer and EOS, else 0.0."""
        return float(tuple(response) == self.answer(prompt))

    def is_held_out(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` belongs to the held-out side of the split."""
        return _held_out(self.decode(prompt))

    def decode(self, ids: Sequence[int]) -> str:
        """Text for people; PAD, EOS and ids without a character are shown in angle brackets."""
        named = {self.pad_id: "<pad>", self.eos_id: "<eos>"} | self._characters
        return "".join(named.get(id, f"<{id}>") for id in ids)

    def _slip(self, id: int, rate: float, rng: random.Random) -> int:
        """A digit as it is, or with probability ``rate`` another one; EOS always as it is."""
        if id == self.eos_id or rng.random() >= rate:
            return id
        return rng.choice([other for d in "0123456789" if (other := self._ids[d]) != id])

    def _encode(self, text: str) -> TokenIds:
        return tuple(self._ids[character] for character in text)

    def _draw_train(self, stream: str, step: int, count: int) -> list[TokenIds]:
        rng = random.Random(f"{stream}/{self._seed}/{step}")
        prompts: list[TokenIds] = []
        while len(prompts) < count:
            text = self._draw(rng)
            if not _held_out(text):
                prompts.append(self._encode(text))
        return prompts

    def _draw_heldout(self) -> list[TokenIds]:
        wanted = self._config.heldout_prompts
        possible = self._count_prompts() // (2 * HELD_OUT_SHARE)  # half of them: quick to find
        rng = random.Random("heldout")
        texts: dict[str, None] = {}  # a set that keeps the order of drawing
        for _ in range(MAX_DRAWS * wanted if wanted <= possible else 0):
            text = self._draw(rng)
            if _held_out(text):
                texts[text] = None
            if len(texts) == wanted:
                return [self._encode(text) for text in texts]
        raise ConfigError(
            f"task.heldout_prompts is {wanted}, but at most {possible} of these prompts can be "
            "held out; raise task.max_digits or lower task.heldout_prompts"
        )

    def _count_prompts(self) -> int:
        lengths = range(self._config.min_digits, self._config.max_digits + 1)
        strings = sum(10**length for length in lengths)
        numbers = sum(9 * 10 ** (length - 1) for length in lengths)
        return sum(numbers**2 if name == "sum" else strings for name in self._config.operations)

    def _draw(self, rng: random.Random) -> str:
        operation = rng.choice(self._config.operations)
        if operation == "sum":
            body = f"{self._draw_number(rng)}+{self._draw_number(rng)}"
        else:
            body = "".join(rng.choice("0123456789") for _ in range(self._draw_length(rng)))
        return f"{_LETTERS[operation]}{body}="

    def _draw_number(self, rng: random.Random) -> int:
        length = self._draw_length(rng)
        return rng.randrange(10 ** (length - 1), 10**length)

    def _draw_length(self, rng: random.Random) -> int:
        return rng.randint(self._config.min_digits, self._config.max_digits)


def _held_out(text: str) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0
