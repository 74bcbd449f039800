"""What is asked of each engine: the same on one with kvkeep and on its reference.

The names of the steps are what the tests ask for. Knows nothing about what the answers ought to be.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from engine import Engine, greedy, random_tokens
from vllm.lora.request import LoRARequest

SHARED_HEAD = random_tokens(512, 20)
TEXT = Path(__file__).resolve().parents[3] / "demo" / "text.txt"
ALWAYS_WRONG = (1, 3, 4)  # seeds, found by trying
EDGES = (255, 256, 257, 1023, 1024, 1025)


def answers(engine: Engine) -> None:
    """Cold, warm, prefixes, extensions, the edges of chunks, two at once, salts, a reset of the cache."""
    prompt = random_tokens(600, 1)
    twice(engine, "whole", prompt)
    engine.ask("prefix", prompt[:560])
    engine.leave_it_to_kvkeep()
    engine.ask("extension", prompt + random_tokens(60, 2))
    engine.reset()
    for count in EDGES:
        twice(engine, f"{count}", random_tokens(count, count))
        engine.reset()
    twice(engine, "two at once", SHARED_HEAD + random_tokens(100, 21), SHARED_HEAD + random_tokens(70, 22))
    engine.reset()
    salts(engine)
    engine.ask("before the reset", prompt)
    engine.llm.reset_prefix_cache(reset_connector=True)
    twice(engine, "after the reset", prompt)


def few(engine: Engine) -> None:
    """One prompt, twice."""
    twice(engine, "whole", random_tokens(600, 1))


def salts(engine: Engine) -> None:
    """One prompt under two salts and none."""
    prompt = random_tokens(600, 40)
    for name, salt in (("salt a", "a"), ("salt b", "b"), ("no salt", ""), ("salt a again", "a"), ("salt b again", "b")):
        engine.ask(name, prompt, salt=salt)
        engine.leave_it_to_kvkeep()
    engine.reset()


def twice(engine: Engine, name: str, *prompts: list[int], new_tokens: int = 8, lora: LoRARequest | None = None) -> None:
    """Cold, then warm."""
    engine.ask(f"{name} cold", *prompts, new_tokens=new_tokens, lora=lora)
    engine.leave_it_to_kvkeep()
    engine.ask(f"{name} warm", *prompts, new_tokens=new_tokens, lora=lora)
    engine.leave_it_to_kvkeep()


def one_prompt(engine: Engine) -> None:
    """Cold, warm, and an extension: for engines that differ in how they are started."""
    prompt = random_tokens(1050, 3)
    twice(engine, "whole", prompt)
    engine.ask("extension", prompt + random_tokens(90, 4))
    engine.leave_it_to_kvkeep()
    twice(engine, "two at once", SHARED_HEAD + random_tokens(100, 21), SHARED_HEAD + random_tokens(70, 22))


def restarted(engine: Engine) -> None:
    """What `one_prompt` asked of an engine that has ended, of one that was just started."""
    prompt = random_tokens(1050, 3)
    engine.ask("whole", prompt)
    engine.leave_it_to_kvkeep()
    engine.ask("whole again", prompt)
    engine.leave_it_to_kvkeep()
    engine.ask("two at once", SHARED_HEAD + random_tokens(100, 21), SHARED_HEAD + random_tokens(70, 22))


def slept(engine: Engine) -> None:
    """The first prompt of `restarted`, before and after a sleep whose weights come back as they were."""
    prompt = random_tokens(1050, 3)
    twice(engine, "before", prompt)
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    twice(engine, "after", prompt)
    twice(engine, "only after", random_tokens(600, 1))


def woken(engine: Engine) -> None:
    """What `slept` asked before its sleep and after it, of an engine that was just started."""
    engine.ask("before", random_tokens(1050, 3))
    engine.ask("only after", random_tokens(600, 1))


def prefixes(engine: Engine) -> None:
    """Six prompts one after the other, each of four chunks and a little more; then two in one step, twice."""
    for number in range(6):
        engine.ask(f"prefix {number}", random_tokens(1050 + 16 * number, 60 + number))
    for name in ("two at once", "two again"):
        engine.ask(name, random_tokens(1024, 70), random_tokens(800, 71))
        engine.leave_it_to_kvkeep()


def tight(engine: Engine) -> None:
    """A batch of at most 512 tokens and few blocks: chunked prefill, an abort in its middle, preemption."""
    twice(engine, "chunked", random_tokens(1050, 30))
    engine.reset()
    abort_in_mid_prefill(engine, random_tokens(1250, 31))
    engine.leave_it_to_kvkeep()
    engine.ask("after the abort", random_tokens(1250, 31))
    engine.reset()
    twice(engine, "crowd", *[random_tokens(265, 50 + number) for number in range(5)], new_tokens=150)
    engine.reset()


def abort_in_mid_prefill(engine: Engine, prompt: list[int]) -> None:
    """Computes two steps of a prompt that needs three, and aborts it."""
    inner = engine.llm.llm_engine
    inner.add_request("to be aborted", {"prompt_token_ids": prompt}, greedy(4))
    outputs = [inner.step(), inner.step()]
    engine.facts["tokens before the abort"] = sum(len(one.outputs[0].token_ids) for step in outputs for one in step)
    inner.abort_request(["to be aborted"], internal=False)
    while inner.has_unfinished_requests():
        inner.step()


def adapters(engine: Engine, folder: Path) -> None:
    """One prompt without an adapter and with two; then another adapter's files in the first one's folder."""
    prompt = random_tokens(600, 60)
    place = put_adapter(folder, engine.keep is not None, "adapter")
    first, second = LoRARequest("first", 1, str(place)), LoRARequest("second", 2, str(folder / "lora-2"))
    meet(engine, first, second)
    for again in ("", " again"):
        for name, lora in (("none", None), ("first", first), ("second", second)):
            engine.ask(f"{name}{again}", prompt, lora=lora)
        engine.leave_it_to_kvkeep()
    replace_adapter(place, folder / "lora-3")
    engine.reset()
    engine.ask("stale", prompt, lora=first)  # the files are new, what the engine holds is not
    engine.reset()
    engine.ask("replaced", prompt, lora=LoRARequest("first", 1, str(place), load_inplace=True))
    engine.leave_it_to_kvkeep()
    meet(engine, first)
    for name in ("replaced again", "replaced once more"):
        engine.ask(name, prompt, lora=first)
        engine.leave_it_to_kvkeep()
    engine.reset()


def early_adapter_on_ranks(engine: Engine, folder: Path) -> None:
    """The same for an engine of several ranks."""
    early_adapter(engine, folder, "ranks")


def early_adapter(engine: Engine, folder: Path, name: str = "early-adapter") -> None:
    """An adapter that is loaded before any request asks for it, and whose files are replaced in between."""
    place = put_adapter(folder, engine.keep is not None, name)
    early = LoRARequest("early", 1, str(place))
    engine.llm.llm_engine.add_lora(early)
    replace_adapter(place, folder / "lora-3")
    meet(engine, early)
    twice(engine, "early", random_tokens(600, 60), lora=early)


def early_adapter_again(engine: Engine, folder: Path) -> None:
    """What `early_adapter` asked, of an engine that really loads the new files."""
    early = LoRARequest("early", 1, str(folder / f"early-adapter-{'kept' if engine.keep is not None else 'plain'}"))
    meet(engine, early)
    twice(engine, "early", random_tokens(600, 60), lora=early)


def put_adapter(folder: Path, kept: bool, name: str) -> Path:
    """The first adapter in a folder of its own."""
    place = folder / f"{name}-{'kept' if kept else 'plain'}"
    shutil.copytree(folder / "lora-1", place)
    return place


def replace_adapter(place: Path, other: Path) -> None:
    """Another adapter's files in the place of what is there, as rsync does it."""
    for file in other.iterdir():
        shutil.copyfile(file, place / f".{file.name}")
        (place / f".{file.name}").rename(place / file.name)


def meet(engine: Engine, *loras: LoRARequest) -> None:
    """First requests with each adapter, until kvkeep says that it knows what the engine has loaded."""
    for lora in loras:
        for turn in range(100):
            missed = engine.metrics().get("kvkeep_miss_adapter", 0)
            name = f"meets {lora.lora_name} {turn} of {len(engine.facts['steps'])}"
            engine.ask(name, random_tokens(40, lora.lora_int_id), lora=lora)
            if engine.metrics().get("kvkeep_miss_adapter", 0) == missed:
                break


def changed_weights(engine: Engine) -> None:
    """Weights that are changed where they lie, and vLLM's own prefix cache emptied, as vLLM's users do it."""
    prompt = random_tokens(600, 100)
    twice(engine, "before", prompt)
    engine.llm.collective_rpc(change_norms)
    engine.reset()
    twice(engine, "changed", prompt)


def change_norms(worker: object) -> None:
    """In a worker: other weights in each layer before K and V are made; no layer packs these anew when it is loaded."""
    for name, parameter in worker.get_model().named_parameters():
        if "input_layernorm" in name:
            parameter.data[::2] *= -2.0


def speculation(engine: Engine) -> None:
    """Drafts that are all wrong, across the edge of a chunk; then a prompt that repeats itself; follow-ups of both."""
    wrong = [always_wrong(seed) for seed in ALWAYS_WRONG]
    engine.ask("rejected", *wrong, new_tokens=12)
    answers = [one["tokens"] for one in engine.facts["steps"]["rejected"]["answers"]]
    engine.leave_it_to_kvkeep()
    engine.ask("after rejected", *[prompt + answer for prompt, answer in zip(wrong, answers, strict=True)])
    engine.reset()
    prompt = random_tokens(40, 70) * 16
    engine.ask("drafted", prompt, new_tokens=200)
    answer = engine.facts["steps"]["drafted"]["answers"][0]["tokens"]
    engine.leave_it_to_kvkeep()
    engine.ask("follow-up", prompt + answer, new_tokens=8)
    engine.reset()


def always_wrong(seed: int) -> list[int]:
    """508 tokens in which every byte has a successor to propose, and it is never the tiny model's choice."""
    order = list(range(256))
    random.Random(seed).shuffle(order)
    return (order * 2)[:508]


def windows(engine: Engine) -> None:
    """A model with sliding windows of 256 tokens, at the edges of chunks and with a longer answer."""
    for count in (500, 512, 1023, 1024, 1030):
        twice(engine, f"{count}", random_tokens(count, count))
        engine.reset()
    prompt = random_tokens(1300, 80)
    twice(engine, "long answer", prompt, new_tokens=40)
    engine.ask("prefix", prompt[:1030])
    engine.leave_it_to_kvkeep()
    engine.ask("extension", prompt + random_tokens(300, 81))
    engine.reset()
    twice(engine, "two at once", SHARED_HEAD + random_tokens(300, 82), SHARED_HEAD + random_tokens(290, 83))
    engine.reset()


def text(engine: Engine) -> None:
    """Questions about the beginning of a real text, through the model's chat template."""
    tokenizer = engine.llm.get_tokenizer()
    passage = TEXT.read_text()[:4300]
    for name, question in (("who", "Who is the main character?"), ("what", "What does she follow?")):
        chat = [{"role": "user", "content": f"{passage}\n\n{question}"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        engine.ask(f"{name} cold", prompt, new_tokens=16)
        engine.leave_it_to_kvkeep()
        engine.ask(f"{name} warm", prompt, new_tokens=16)
        engine.leave_it_to_kvkeep()


def small_pool(engine: Engine) -> None:
    """A prompt of five chunks where the pool has room for three."""
    twice(engine, "too large", random_tokens(1300, 90))
    engine.ask("small", random_tokens(300, 91))
    engine.leave_it_to_kvkeep()
    engine.ask("too large again", random_tokens(1300, 90))
    engine.reset()


def recurrent(engine: Engine) -> None:
    """Prompts over several blocks of a recurrent model: as a whole, longer, shorter than where its states are, two."""
    prompt = random_tokens(2600, 50)
    twice(engine, "whole", prompt)
    engine.ask("extension", prompt + random_tokens(90, 51))
    engine.leave_it_to_kvkeep()
    engine.ask("branch", prompt[:2400] + random_tokens(200, 52))
    engine.leave_it_to_kvkeep()
    engine.ask("shorter", prompt[:1300])
    engine.leave_it_to_kvkeep()
    twice(engine, "at a boundary", random_tokens(2304, 53))
    head = random_tokens(2304, 54)
    twice(engine, "two at once", head + random_tokens(100, 55), head + random_tokens(70, 56))


def recurrent_again(engine: Engine) -> None:
    """What `recurrent` asked of an engine that has ended, of one that was just started."""
    prompt = random_tokens(2600, 50)
    engine.ask("whole", prompt)
    engine.leave_it_to_kvkeep()
    engine.ask("extension", prompt + random_tokens(90, 51))
    engine.leave_it_to_kvkeep()
    head = random_tokens(2304, 54)
    engine.ask("two at once", head + random_tokens(100, 55), head + random_tokens(70, 56))
