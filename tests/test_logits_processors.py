"""What a sequence's own tokens force and forbid, and users' code between logits and choice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.equality import assert_same_tokens
from helpers.gpu_shards import make_gpu_shard
from helpers.host_device import HostDevice
from helpers.running import Arrival, make_shard, run
from helpers.tiny_models import directory
from helpers.tokenizers import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.guidance import Guidance
from tensorray.actors.link import PendingStep
from tensorray.actors.logits_processors import (
    CudaLogitsProcessor,
    ProcessorError,
    load_registry,
    spell,
)
from tensorray.actors.output_rules import OutputRules
from tensorray.actors.protocol import ProcessorCall, Sampling, SequenceStart, StepPlan, StepResult
from tensorray.actors.sampler import Sampler
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.output_control import controls
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.structured_outputs import StructuredOutputs
from tensorray.cluster.vocabulary import load_vocabulary

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "logits_processors.json").read_text())
MODEL = "qwen3"
VOCAB = 272


def start(seq: int, sampling: Sampling, tokens: list[int], prompt: int = 2) -> SequenceStart:
    return SequenceStart(
        seq=seq, tokens=tokens, prompt_len=prompt, computed=0, blocks=[], sampling=sampling
    )


# --- processors of users ---


class Prefer:
    """Adds to one token."""

    def __init__(self, token: int, by: float = 1000.0) -> None:
        self._token = token
        self._by = by

    def __call__(self, output: list[int], prompt: list[int], logits: Any) -> None:
        logits[self._token] += self._by


class Alternate:
    """Looks at all it is given: the parity of the sum of the tokens so far is what may come."""

    on_device = True

    def __call__(self, output: list[int], prompt: list[int], logits: Any) -> Any:
        changed = logits.copy()
        changed[(sum(output) + sum(prompt) + len(output)) % 2 :: 2] = -np.inf
        return changed


class Spoil:
    """Does what the request says it should not."""

    def __init__(self, how: str, after: int = 1) -> None:
        self._how = how
        self._after = after

    def __call__(self, output: list[int], prompt: list[int], logits: Any) -> Any:
        if len(output) < self._after:
            return None
        match self._how:
            case "raise":
                raise RuntimeError("nothing doing")
            case "nan":
                logits[3] = np.nan
            case "inf":
                logits[3] = np.inf
            case "nothing":
                logits[:] = -np.inf
            case "shape":
                return logits[:5]
            case "list":
                return [0.0] * len(logits)
        return None


class Count:
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("not today")


REGISTRY = {each.__name__: each for each in (Prefer, Alternate, Spoil, Count)}


def calls(name: str, **arguments: Any) -> list[ProcessorCall]:
    return [ProcessorCall(name, arguments)]


# --- rules alone ---


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=str)
def test_what_is_banned_is_what_transformers_bans(case: dict[str, Any]) -> None:
    tokens = case["tokens"]
    for prompt in (1, len(tokens)):
        words = Sampling(bad_words=case["bad_words"])
        assert (
            sorted(set(OutputRules(start(0, words, tokens, prompt)).banned))
            == (case["banned_by_words"])
        )
        ngrams = Sampling(no_repeat_ngram_size=case["ngram"])
        assert (
            sorted(set(OutputRules(start(0, ngrams, tokens, prompt)).banned))
            == (case["banned_by_ngram"])
        )


words = st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=4), max_size=4)


@given(words, st.integers(0, 4), st.lists(st.integers(0, 40), max_size=3), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_rules_that_start_late_are_those_that_were_told(
    bad_words: list[list[int]], ngram: int, forced: list[int], seed: int
) -> None:
    sampling = Sampling(bad_words=bad_words, no_repeat_ngram_size=ngram, forced_prefix=forced)
    told = OutputRules(start(0, sampling, [1, 2]))
    tokens = [1, 2]
    for token in np.random.default_rng(seed).integers(0, 6, 150).tolist():
        told.append(token)
        tokens.append(token)
        late = OutputRules(start(0, sampling, tokens))
        assert (told.forced, sorted(told.banned)) == (late.forced, sorted(late.banned))
        mask = np.full(2, -1, np.int32)
        late.restrict(mask)
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
        if late.forced is None:
            assert allowed == sorted({*range(64)} - {*late.banned})
        else:
            assert allowed == [late.forced]


def test_a_beam_s_step_does_not_read_its_whole_prompt_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[int] = []
    note = OutputRules._note

    def count(rules: OutputRules, token: int) -> None:
        noted.append(token)
        note(rules, token)

    monkeypatch.setattr(OutputRules, "_note", count)
    sampling = Sampling(bad_words=[[3, 4], [8, 9, 5]], forced_prefix=[1, 2], beam=True)
    tokens = [*range(10)] * 100
    for length in (10, 1000):
        noted.clear()
        rules = OutputRules(start(0, sampling, tokens[:length], prompt=4))
        assert noted == [8, 9]
        assert rules.banned == [5]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_beam_s_step_makes_no_table_of_n_grams(size: int) -> None:
    """And finds the same without, whatever bytes its tokens are made of."""
    drawn = np.random.default_rng(size).choice([0, 1, 256, 65536, 1 << 24, 257], 400).tolist()
    sampling = Sampling(no_repeat_ngram_size=size, beam=True)
    whole = OutputRules(start(0, sampling, drawn[:2]))
    found = 0
    for length in range(2, len(drawn)):
        rules = OutputRules(start(0, sampling, drawn[:length], prompt=2))
        assert sorted(rules.banned) == sorted(whole.banned)
        assert rules._ngrams._followers is None
        found += len(whole.banned)
        whole.append(drawn[length])
    assert found > 10
    assert whole._ngrams._followers is not None, "which pays where it is asked again and again"


# --- in the samplers ---

STEERED = [
    Sampling(seed=1, bad_words=[[3, 4], [5, 6, 7]], no_repeat_ngram_size=1),
    Sampling(seed=2, forced_prefix=[7, 7, 9], repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(seed=3, logits_processors=calls("Prefer", token=11, by=4.0), logprobs=2),
    Sampling(seed=4, logits_processors=[*calls("Alternate"), *calls("Prefer", token=8, by=2.0)]),
    Sampling(seed=5, logits_processors=calls("Alternate"), no_repeat_ngram_size=2, top_k=9),
    Sampling(temperature=0.0, forced_prefix=[30], logits_processors=calls("Prefer", token=12)),
    Sampling(seed=6),
    Sampling(temperature=0.0, no_repeat_ngram_size=1, banned_token_ids=[2]),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_device_sampler_steers_as_the_host_s_does_with_steps_in_flight(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    count = len(STEERED)
    steps = rng.normal(0, 2, (14, count, 40)).astype(dtype)
    host = Sampler(40, None, REGISTRY)
    device = DeviceSampler(HostDevice(), 40, count, None, None, REGISTRY)
    for seq, sampling in enumerate(STEERED):
        host.start(start(seq, sampling, [5, 6]))
        device.start(start(seq, sampling, [5, 6]), seq)
    seqs, rows = list(range(count)), np.arange(count, dtype=np.int32)
    expected = [host.sample(seqs, logits.astype(np.float32)) for logits in steps]
    found, under_way = [], []
    for logits in steps:
        under_way.append(device.enqueue(seqs, rows, logits))
        if len(under_way) == 2:
            found.append(device.collect(under_way.pop(0)))
    found.append(device.collect(under_way.pop()))
    assert [tokens for tokens, _, _ in found] == [tokens for tokens, _, _ in expected]
    assert not any(failed for _, _, failed in [*found, *expected])
    for (_, ours, _), (_, theirs, _) in zip(found, expected, strict=True):
        assert ours[2].logprob == pytest.approx(theirs[2].logprob, abs=1e-5)
        assert ours[2].top_tokens == theirs[2].top_tokens
    first = [tokens[1] for tokens, _, _ in expected[:3]]
    assert first == [7, 7, 9]
    assert expected[0][0][5] == 30
    assert len({tokens[0] for tokens, _, _ in expected}) == len(steps)
    assert {tokens[5] for tokens, _, _ in expected[1:]} == {12}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "Spoil failed: RuntimeError: nothing doing"),
        ("nan", "Spoil left NaN"),
        ("inf", r"Spoil left NaN or \+inf"),
        ("nothing", "Spoil left no token"),
        ("shape", r"Spoil returned float32 \[5\]"),
        ("list", "Spoil returned list"),
    ],
)
def test_a_processor_that_fails_ends_its_own_sequence(how: str, message: str) -> None:
    host = Sampler(40, None, REGISTRY)
    device = DeviceSampler(HostDevice(), 40, 3, None, None, REGISTRY)
    samplings = [
        Sampling(seed=1),
        Sampling(seed=2, logits_processors=calls("Spoil", how=how)),
        Sampling(seed=3, no_repeat_ngram_size=1),
    ]
    alone = Sampler(40, None, REGISTRY)
    for seq, sampling in enumerate(samplings):
        host.start(start(seq, sampling, [5, 6]))
        device.start(start(seq, sampling, [5, 6]), seq)
        if seq != 1:
            alone.start(start(seq, sampling, [5, 6]))
    rows = np.arange(3, dtype=np.int32)
    for i, logits in enumerate(np.random.default_rng(1).normal(0, 2, (2, 3, 40))):
        logits = logits.astype(np.float32)
        kept = logits.copy()
        expected = alone.sample([0, 2], logits[[0, 2]])[0]
        for tokens, _, failed in (
            host.sample([0, 1, 2], logits),
            device.collect(device.enqueue([0, 1, 2], rows, logits)),
        ):
            assert [tokens[0], tokens[2]] == expected
            assert list(failed) == ([1] if i else [])
            if i:
                with pytest.raises(AssertionError, match=message):
                    raise AssertionError(failed[1])
        assert (logits == kept).all()


def test_one_that_can_not_be_made_fails_its_sequence() -> None:
    for name, message in (("Count", "can't be made: ValueError: not today"), ("Gone", "no logits")):
        sampler = Sampler(40, None, REGISTRY)
        sampler.start(start(0, Sampling(logits_processors=calls(name)), [5, 6]))
        assert message in sampler.sample([0], np.zeros((1, 40), np.float32))[2][0]


def test_logits_that_were_bad_before_are_the_model_s_fault() -> None:
    logits = np.full((1, 40), np.nan, np.float32)
    sampling = Sampling(logits_processors=calls("Prefer", token=1))
    host = Sampler(40, None, REGISTRY)
    device = DeviceSampler(HostDevice(), 40, 1, None, None, REGISTRY)
    host.start(start(0, sampling, [5, 6]))
    device.start(start(0, sampling, [5, 6]), 0)
    rows = np.zeros(1, np.int32)
    for found in (
        host.sample([0], logits)[2],
        device.collect(device.enqueue([0], rows, logits))[2],
    ):
        assert found[0].startswith("the model's logits hold NaN")


# --- in shards ---


class _Ahead:
    """A shard whose results are read once the next step was started."""

    def __init__(self, shard: GpuShard) -> None:
        self.info = shard.info
        self._shard = shard

    def execute(self, plan: StepPlan) -> StepResult:
        return _Late(self._shard.submit(plan))  # type: ignore[return-value]


class _Late:
    def __init__(self, pending: PendingStep) -> None:
        self._pending = pending
        self._result: StepResult | None = None

    def __getattr__(self, name: str) -> Any:
        self._result = self._result or self._pending()
        return getattr(self._result, name)


@pytest.mark.parametrize("num_blocks", [200, 20])
def test_shards_agree_also_where_sequences_are_preempted(num_blocks: int) -> None:
    vocabulary = load_vocabulary(EngineConfig(model=str(directory(MODEL))))
    grammar = StructuredOutputs(regex="([a-z]{4} ){3}").compiled()
    samplings = [
        Sampling(seed=1, temperature=0.9, no_repeat_ngram_size=2, bad_words=[[7, 8]]),
        Sampling(seed=2, forced_prefix=[*range(60, 70)]),
        Sampling(seed=3, logits_processors=calls("Alternate")),
        Sampling(seed=4, logits_processors=calls("Prefer", token=77, by=3.0)),
        Sampling(temperature=0.0),
        Sampling(
            seed=5,
            grammar=grammar,
            stop_token_ids=[1],
            no_repeat_ngram_size=1,
            logits_processors=calls("Prefer", token=76, by=2.0),
        ),
    ]
    # The last two share a prompt, so that blocks are shared too.
    arrivals = [
        Arrival(i // 3, [*range(3, 20), min(i, 4) + 20], sampling, 24)
        for i, sampling in enumerate(samplings)
    ]
    options: dict[str, Any] = {
        "num_blocks": num_blocks,
        "vocabulary": lambda: vocabulary,
        "processors": REGISTRY,
    }

    def scheduler(shard: Any) -> Scheduler:
        return Scheduler(shard.info.kv, max_model_len=64, max_num_seqs=6, max_num_batched_tokens=40)

    cpu = make_shard(directory(MODEL), **options)
    books = scheduler(cpu)
    expected = [outcome.tokens for outcome in run(cpu, books, arrivals)]
    assert (books.stats().preemptions > 0) == (num_blocks == 20)
    assert expected[1][:10] == [*range(60, 70)]
    assert all(map(expected[5].__contains__, [76])) or expected[5]
    for depth in (1, 2):
        gpu = make_gpu_shard(directory(MODEL), **options)
        driven: Any = _Ahead(gpu) if depth == 2 else gpu
        found = run(driven, scheduler(gpu), arrivals, depth=depth)
        assert [outcome.tokens for outcome in found] == expected


def test_a_grammar_and_rules_that_exclude_each_other_leave_nothing() -> None:
    vocabulary = load_vocabulary(EngineConfig(model=str(directory(MODEL))))
    grammar = StructuredOutputs(choice=["ab"]).compiled()
    guidance = Guidance(lambda: vocabulary, VOCAB)
    sampling = Sampling(grammar=grammar, forced_prefix=[90])
    host, device = Sampler(VOCAB, guidance), DeviceSampler(HostDevice(), VOCAB, 1, None, guidance)
    host.start(start(0, sampling, [5, 6]))
    device.start(start(0, sampling, [5, 6]), 0)
    logits = np.zeros((1, VOCAB), np.float32)
    assert "forced_prefix" in host.sample([0], logits)[2][0]
    found = device.collect(device.enqueue([0], np.zeros(1, np.int32), logits))
    assert "forced_prefix" in found[2][0]


# --- through LLM ---


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    settings: dict[str, Any] = {"num_kv_blocks": 256, "max_model_len": 64, "num_threads": 1}
    with LLM(str(directory(MODEL)), logits_processors=[Prefer, Spoil], **settings) as made:
        yield made


@pytest.mark.parametrize("case", GOLDEN["written"], ids=lambda case: case["model"])
def test_models_write_what_transformers_writes(case: dict[str, Any]) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=24,
        ignore_eos=True,
        bad_words=case["bad_words"],
        no_repeat_ngram_size=case["ngram"],
    )
    path = str(directory(case["model"]))
    with LLM(path, num_kv_blocks=64, max_model_len=64, num_threads=1) as llm:
        (answer,) = llm.generate([case["prompt"]], params)
    assert_same_tokens(answer.outputs[0].token_ids, case["tokens"], case["margins"])


def test_every_sequence_of_a_request_is_steered_by_its_own_tokens(llm: LLM) -> None:
    params = SamplingParams(
        n=4, seed=3, max_tokens=20, ignore_eos=True, no_repeat_ngram_size=1, forced_prefix=" in"
    )
    (answer,) = llm.generate(["the rain"], params)
    outputs = [output.token_ids for output in answer.outputs]
    assert len({tuple(tokens) for tokens in outputs}) == 4
    for output in answer.outputs:
        assert output.text.startswith(" in")
        assert len(set(output.token_ids)) == 20
    (again,) = llm.generate(["the rain"], params)  # its prompt's blocks are found this time
    assert again.num_cached_tokens > 0 or len(again.prompt_token_ids) <= 16
    assert [output.token_ids for output in again.outputs] == outputs


def test_a_processor_is_chosen_by_name_and_fails_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
    prefers = {"name": "Prefer", "arguments": {"token": 40}}
    (plain,) = llm.generate([[3, 4]], params)
    chosen = SamplingParams(**{**params.model_dump(), "logits_processors": [prefers]})
    spoiled = SamplingParams(
        max_tokens=4, logits_processors=[{"name": "Spoil", "arguments": {"how": "raise"}}]
    )
    preferred, same = llm.generate([[3, 4], [3, 4]], [chosen, params])
    assert preferred.outputs[0].token_ids == [40] * 4
    assert same.outputs[0].token_ids == plain.outputs[0].token_ids
    with pytest.raises(Exception, match="Spoil failed: RuntimeError: nothing doing"):
        llm.generate([[3, 4]], spoiled)
    assert llm.generate([[3, 4]], params)[0].outputs[0].token_ids == plain.outputs[0].token_ids


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"bad_words": [""]}, "bad_words", "at least 1 character"),
        ({"bad_words": [[]]}, "bad_words", "at least 1 item"),
        ({"bad_words": [[5, 999]]}, "bad_words", "names token 999"),
        ({"bad_words": [[5] * 257]}, "bad_words", "256 is the most"),
        ({"bad_words": ["\ud800"]}, "bad_words", "valid|encoded|surrogate"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size", "greater than or equal to 0"),
        ({"no_repeat_ngram_size": 65}, "no_repeat_ngram_size", "less than or equal to 64"),
        ({"forced_prefix": ""}, "forced_prefix", "at least 1 character"),
        ({"forced_prefix": [999]}, "forced_prefix", "names token 999"),
        ({"forced_prefix": [1]}, "forced_prefix", "which ends the output"),
        ({"forced_prefix": [9], "banned_token_ids": [9]}, "forced_prefix", "exclude"),
        ({"forced_prefix": [9], "bad_words": [[9]]}, "forced_prefix", "exclude"),
        ({"forced_prefix": [9], "allowed_token_ids": [8]}, "forced_prefix", "exclude"),
        ({"forced_prefix": [9, 9], "max_tokens": 1}, "forced_prefix", "more than max_tokens"),
        ({"logits_processors": ["Gone"]}, "logits_processors", "no logits processor 'Gone'"),
        ({"logits_processors": ["Prefer"]}, "logits_processors", "missing .* 'token'"),
        (
            {"logits_processors": [{"name": "Prefer", "arguments": {"tokn": 1}}]},
            "logits_processors",
            "missing|unexpected",
        ),
        (
            {"logits_processors": [{"name": "Prefer", "arguments": {"token": 10**30}}]},
            "logits_processors",
            "can't be sent",
        ),
        ({"logits_processors": [{"arguments": {}}]}, "logits_processors", "name|required"),
    ],
)
def test_bad_values_are_refused_by_name(
    llm: LLM, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(BadRequest, match=message) as error:
        llm.frontend.request([3, 4], llm.frontend.params(**fields), request_id="x")
    assert (error.value.param or "").startswith(param)


def test_a_bad_word_is_banned_within_words_and_after_spaces() -> None:
    """SentencePiece puts a space before a text's start, which a word in a text may not have."""
    tokenizer = sentencepiece()
    params = SamplingParams(bad_words=["the", [4, 5], [4]])
    found = controls(params, Sampling(), tokenizer, {}, tokenizer.vocab_size)
    words = [*found["bad_words"], *([token] for token in found["banned_token_ids"])]
    texts = {b"".join(tokenizer.token_bytes[t] for t in word) for word in words}
    assert {b"the", b" the"} <= texts
    assert [4, 5] in words
    assert [4] in words


# --- registering ---


def test_processors_are_loaded_from_modules_and_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class Mine:\n    def __call__(self, output, prompt, logits): pass\n")
    found = load_registry([f"{path}:Mine", "collections:Counter", spell(Prefer)])
    assert [*found] == ["Mine", "Counter", "Prefer"]
    assert found["Prefer"] is Prefer


def test_a_stream_goes_on_only_where_the_same_processors_are_registered() -> None:
    def digest(*processors: str) -> str:
        return EngineConfig(model="a", logits_processors=list(processors)).model_digest()

    assert digest("one.py:One") == digest("one.py:One")
    assert len({digest(), digest("one.py:One"), digest("one.py:One", "two.py:Two")}) == 3


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("Mine", "must be pkg.module:Class"),
        ("no.such.module:Mine", "ModuleNotFoundError"),
        ("json:Mine", "AttributeError"),
        ("/no/such/file.py:Mine", "FileNotFoundError"),
        ("math:pi", "is not a class"),
    ],
)
def test_what_can_not_be_registered_is_refused(spelling: str, message: str) -> None:
    with pytest.raises(ProcessorError, match=message):
        load_registry([spelling])


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class Prefer: pass\n")
    with pytest.raises(ProcessorError, match="two of them are called Prefer"):
        load_registry([f"{path}:Prefer", spell(Prefer)])


# --- CUDA ---

SHARPEN = """
#include "common.cuh"
extern "C" __global__ void sharpen(
    float* logits, int vocab, const int* tokens, int prompt, int length, const float* arguments) {
  const int token = blockIdx.x * blockDim.x + threadIdx.x;
  if (token >= vocab) return;
  logits[token] *= arguments[0];
  for (int i = prompt; i < length; ++i)
    if (tokens[i] == token) logits[token] -= arguments[1];
}
"""


class Sharpen(CudaLogitsProcessor):
    kernel = "sharpen"
    parameters = ("factor", "against")


def test_a_cuda_processor_compiles_without_a_gpu_and_checks_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="compiling CUDA kernels needs cuda-bindings")
    from tensorray.kernels.cuda import compiler

    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    source = tmp_path / "sharpen.cu"
    source.write_text(SHARPEN)
    assert compiler.compile(str(source), "sm_90a")
    source.write_text(SHARPEN.replace("arguments[0]", "arguments[0"))
    with pytest.raises(compiler.CompileError, match="does not compile"):
        compiler.compile(str(source), "sm_90a")
    with pytest.raises(TypeError, match="its arguments are factor, against, not factor"):
        Sharpen(factor=2.0)


def test_a_cuda_processor_on_a_cpu_says_so() -> None:
    sampler = Sampler(40, None, {"Sharpen": Sharpen})
    asked = calls("Sharpen", factor=2.0, against=1.0)
    sampler.start(start(0, Sampling(logits_processors=asked), [5, 6]))
    assert "runs on a GPU" in sampler.sample([0], np.zeros((1, 40), np.float32))[2][0]


def test_the_guide_s_processor_runs() -> None:
    text = (Path(__file__).parents[1] / "deploy" / "GUIDE.md").read_text()
    block = text.split("<!-- run by tests/test_logits_processors.py -->\n```python\n")[1]
    names: dict[str, Any] = {}
    exec(block.split("```")[0], names)
    sampler = Sampler(40, None, {"Prefer": names["Prefer"]})
    asked = calls("Prefer", token=7, by=9.0)
    sampler.start(start(0, Sampling(temperature=0.0, logits_processors=asked), [5, 6]))
    assert sampler.sample([0], np.zeros((1, 40), np.float32))[0] == [7]
