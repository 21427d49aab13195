"""The task: rewards by a rule, a held-out split that training never meets, the same on resume."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.config.run import TaskConfig
from fp8rl.errors import ConfigError
from fp8rl.task import DigitTask

ALL = TaskConfig(operations=("reverse", "sort", "sum"))


def encode(task: DigitTask, text: str) -> tuple[int, ...]:
    """Ids of a text, read off ``decode``."""
    ids = {task.decode([id]): id for id in range(task.vocab_size)}
    return tuple(ids[character] for character in text)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("R38152=", "25183"), ("S38152=", "12358"), ("R007=", "700"), ("A381+52=", "433")],
)
def test_the_answer_is_the_rule_and_eos(prompt: str, answer: str) -> None:
    task = DigitTask(ALL, 0)
    assert task.decode(task.answer(encode(task, prompt))) == answer + "<eos>"


def test_only_the_exact_answer_with_eos_earns_a_reward() -> None:
    task = DigitTask(ALL, 0)
    prompt = encode(task, "R381=")
    right = encode(task, "183")
    assert task.reward(prompt, (*right, task.eos_id)) == 1.0
    wrong = [
        (),
        (task.eos_id,),
        right,
        right[:-1],
        (*right[:-1], task.eos_id),
        (*right, task.eos_id, task.eos_id),
        (*right, right[0], task.eos_id),
        (*encode(task, "381"), task.eos_id),
        (*right, task.pad_id),
    ]
    assert [task.reward(prompt, response) for response in wrong] == [0.0] * len(wrong)


def test_a_list_of_ids_is_as_good_as_a_tuple() -> None:
    task = DigitTask(ALL, 0)
    prompt = list(encode(task, "S3120="))
    assert task.reward(prompt, list(task.answer(prompt))) == 1.0


def test_what_is_no_prompt_has_no_answer() -> None:
    task = DigitTask(ALL, 0)
    for text in ("381=", "R381", ""):
        with pytest.raises(ValueError, match="is not a prompt"):
            task.answer(encode(task, text))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(0, 10_000))
def test_training_never_meets_a_held_out_prompt(seed: int, step: int) -> None:
    task = DigitTask(ALL, seed)
    held_out = set(task.heldout_prompts())
    drawn = task.train_prompts(step, 64) + [
        prompt for prompt, _ in task.demonstrations(step, 64, 0.5)
    ]
    assert held_out.isdisjoint(drawn)
    assert not any(task.is_held_out(prompt) for prompt in drawn)


def test_held_out_prompts_are_distinct_and_the_same_for_every_seed() -> None:
    task = DigitTask(ALL, 0)
    held_out = task.heldout_prompts()
    assert held_out == DigitTask(ALL, 7).heldout_prompts()
    assert len(set(held_out)) == len(held_out) == ALL.heldout_prompts
    assert all(task.is_held_out(prompt) for prompt in held_out)


def test_a_resumed_run_sees_what_the_unbroken_one_would_have_seen() -> None:
    unbroken, resumed = DigitTask(ALL, 3), DigitTask(ALL, 3)
    for step in range(5):
        unbroken.train_prompts(step, 32)
        unbroken.demonstrations(step, 32, 0.5)
    assert resumed.train_prompts(5, 32) == unbroken.train_prompts(5, 32)
    assert resumed.demonstrations(5, 32, 0.5) == unbroken.demonstrations(5, 32, 0.5)


def test_steps_seeds_and_warmup_draw_different_prompts() -> None:
    task = DigitTask(ALL, 3)
    draws = [
        task.train_prompts(5, 32),
        task.train_prompts(6, 32),
        DigitTask(ALL, 4).train_prompts(5, 32),
        [prompt for prompt, _ in task.demonstrations(5, 32, 0.5)],
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_a_larger_batch_starts_with_the_smaller_one() -> None:
    task = DigitTask(ALL, 3)
    assert task.train_prompts(1, 64)[:16] == task.train_prompts(1, 16)


@pytest.mark.parametrize("slip_rate", [0.0, 0.33, 1.0])
def test_digits_of_demonstrations_are_wrong_as_often_as_asked(slip_rate: float) -> None:
    task = DigitTask(ALL, 1)
    digits = wrong = 0
    for prompt, said in task.demonstrations(0, 2000, slip_rate):
        right = task.answer(prompt)
        assert len(said) == len(right) and said[-1] == task.eos_id
        assert all(task.decode([id]).isdecimal() for id in said[:-1])
        digits += len(right) - 1
        wrong += sum(a != b for a, b in zip(right, said, strict=True))
    assert wrong / digits == pytest.approx(slip_rate, abs=0.02)


@pytest.mark.parametrize("operation", ["reverse", "sort", "sum"])
def test_lengths_and_ids_stay_within_what_is_announced(operation: str) -> None:
    task = DigitTask(
        TaskConfig(operations=(operation,), min_digits=1, max_digits=3, heldout_prompts=8), 0
    )
    examples = task.demonstrations(0, 2000, 0.5)
    assert max(len(prompt) for prompt, _ in examples) == task.max_prompt_tokens
    assert max(len(answer) for _, answer in examples) == task.max_response_tokens
    ids = {id for prompt, answer in examples for id in (*prompt, *answer)}
    assert task.pad_id not in ids
    assert max(ids) < task.vocab_size
    assert task.vocab_size % 64 == 0


def test_all_operations_and_lengths_appear() -> None:
    task = DigitTask(TaskConfig(operations=("reverse", "sort"), min_digits=2, max_digits=4), 0)
    texts = [task.decode(prompt) for prompt in task.train_prompts(0, 400)]
    assert {text[0] for text in texts} == {"R", "S"}
    assert {len(text) - 2 for text in texts} == {2, 3, 4}


@pytest.mark.parametrize("heldout", [1, 50, 256, 10**9])
def test_too_few_prompts_to_hold_out_are_refused(heldout: int) -> None:
    config = TaskConfig(
        operations=("reverse",), min_digits=1, max_digits=1, heldout_prompts=heldout
    )
    with pytest.raises(ConfigError, match=rf"heldout_prompts is {heldout}.*max_digits"):
        DigitTask(config, 0)


def test_decode_shows_what_has_no_character() -> None:
    task = DigitTask(ALL, 0)
    assert task.decode([task.eos_id, task.pad_id, task.vocab_size - 1]) == "<eos><pad><63>"
