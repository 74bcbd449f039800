"""A real engine with kvkeep answers as one without it, and reuses what it should.

float32: the tokens are those of the run without kvkeep; so are the logprobs, to the bit wherever both runs computed the
same number of the prompt's tokens. Where they did not, a cold run and vLLM's own prefix hit differ from each other by a
few units in the last place as well.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm

LAST_PLACES = 1e-5  # float32, a logprob near -5: 1.4e-6 was seen with 2 layers, 6.3e-6 with SmolLM2's 30


def check_same(runs, name, *steps, exact=True):
    """Each step's answers are the reference's; `exact`: to the bit where equally much was reused."""
    keep, plain = runs.pair(name)
    for step in steps:
        for ours, theirs in zip(keep.answers(step), plain.answers(step), strict=True):
            assert ours["tokens"] == theirs["tokens"], step
            if exact and ours["cached"] == theirs["cached"]:
                assert ours["logprobs"] == theirs["logprobs"], step
            else:
                assert ours["logprobs"] == pytest.approx(theirs["logprobs"], rel=0, abs=LAST_PLACES), step


def test_a_cold_prompt_reuses_nothing_and_answers_the_same(runs):
    assert runs("tiny").external("whole cold") == 0
    check_same(runs, "tiny", "whole cold")


def test_a_warm_prompt_reuses_its_whole_chunks(runs):
    assert runs("tiny").external("whole warm") == 512
    assert runs("tiny-plain").answers("whole warm")[0]["cached"] == 512  # so the logprobs are compared to the bit
    check_same(runs, "tiny", "whole warm")


def test_a_prefix_of_a_stored_prompt_is_reused(runs):
    assert runs("tiny").external("prefix") == 512
    check_same(runs, "tiny", "prefix")


def test_a_prompt_that_extends_a_stored_one_reuses_it(runs):
    assert runs("tiny").external("extension") == 512
    check_same(runs, "tiny", "extension")


@pytest.mark.parametrize(
    ("tokens", "reused"), [(255, 0), (256, 255), (257, 256), (1023, 768), (1024, 1023), (1025, 1024)]
)
def test_at_the_edges_of_chunks_all_but_one_token_is_reused_at_most(runs, tokens, reused):
    keep = runs("tiny")
    assert (keep.external(f"{tokens} cold"), keep.external(f"{tokens} warm")) == (0, reused)
    check_same(runs, "tiny", f"{tokens} cold", f"{tokens} warm")


def test_two_requests_at_once_share_a_prefix(runs):
    step = runs("tiny").step("two at once warm")
    assert (step["external"], step["local"]) == (1024, 0)  # each loads its own: what one loads the other must not read
    check_same(runs, "tiny", "two at once cold", "two at once warm")


def test_salts_are_never_shared_and_each_finds_its_own(runs):
    keep = runs("tiny")
    assert [keep.external(step) for step in ("salt a", "salt b", "no salt")] == [0, 0, 0]
    assert [keep.external(step) for step in ("salt a again", "salt b again")] == [512, 512]
    check_same(runs, "tiny", "salt a", "salt b", "no salt", "salt a again", "salt b again")


def test_after_reset_cache_nothing_stored_before_is_reused(runs):
    keep = runs("tiny")
    steps = ("before the reset", "after the reset cold", "after the reset warm")
    assert [keep.external(step) for step in steps] == [512, 0, 512]
    assert keep.figure("resets") == 1
    check_same(runs, "tiny", *steps)


def test_after_a_sleep_nothing_of_before_is_reused_until_a_restart(runs):
    keep = runs("slept")
    steps = ("before cold", "before warm", "after cold", "after warm", "only after cold", "only after warm")
    assert [keep.external(step) for step in steps] == [0, 1024, 0, 1024, 0, 512]
    check_same(runs, "slept", *steps)
    again = runs("slept-restarted")
    assert [again.external(step) for step in ("before", "only after")] == [1024, 0]
    check_same(runs, "slept-restarted", "before", "only after")


def test_chunked_prefill_is_stored_and_given_back(runs):
    assert [runs("tight").external(f"chunked {step}") for step in ("cold", "warm")] == [0, 1024]
    check_same(runs, "tight", "chunked cold", "chunked warm")


def test_a_request_aborted_in_mid_prefill_leaves_what_it_completed(runs):
    keep = runs("tight")
    assert keep.facts["tokens before the abort"] == 0  # it was still reading its prompt
    assert keep.external("after the abort") == 1024
    check_same(runs, "tight", "after the abort")


def test_preempted_requests_answer_the_same_and_load_again(runs):
    keep = runs("tight")
    assert keep.metric("num_preemptions") > 0
    assert runs("tight-plain").metric("num_preemptions") == 0
    assert keep.figure("claimed_after_preemption_tokens") > 0
    assert [keep.external(f"crowd {step}") for step in ("cold", "warm")] == [0, 5 * 256]
    check_same(runs, "tight", "crowd cold", "crowd warm", exact=False)


def test_rejected_drafts_are_neither_stored_nor_seen(runs):
    keep = runs("speculation")
    drafted, accepted = keep.metric("spec_decode_num_draft_tokens"), keep.metric("spec_decode_num_accepted_tokens")
    assert drafted - accepted >= 50, "these drafts are mostly right: they test nothing"
    check_same(runs, "speculation", "drafted", "follow-up", exact=False)


def test_an_engine_that_was_restarted_reads_from_disk_what_the_last_one_kept(runs):
    keep = runs("restarted")
    assert [keep.external(step) for step in ("whole", "whole again")] == [1024, 1024]
    assert keep.reused("two at once") == 1024
    assert keep.figure("disk_fetched_chunks") == 4 + 2  # the second of the two finds the first one's in the pool
    check_same(runs, "restarted", "whole", "whole again", "two at once", exact=False)


def test_engines_share_a_store_one_fills_and_the_other_hits_and_another_dtype_is_another_cache(runs):
    for name in ("bf16", "processes"):
        assert runs(name).external("whole cold") == 0, "another engine's chunks were given to it"
    keep = runs("joined")
    assert [keep.external(step) for step in ("whole", "whole again")] == [1024, 1024]
    assert keep.reused("two at once") == 1024
    assert keep.figure("stored_chunks") == 0
    check_same(runs, "joined", "whole", "whole again", "two at once", exact=False)
    assert keep.stats["pinned_nbytes"] == keep.stats["quarantined_nbytes"] == 0
    assert keep.stats["problem"] == ""


def test_drafts_that_are_all_rejected_leave_nothing(runs):
    rise = runs("speculation").facts["steps"]["rejected"]["rise"]
    drafted = rise["vllm:spec_decode_num_draft_tokens"]
    assert (drafted >= 40, rise.get("vllm:spec_decode_num_accepted_tokens", 0)) == (True, 0), "not all were rejected"
    assert runs("speculation").external("after rejected") == 3 * 512
    check_same(runs, "speculation", "rejected", "after rejected", exact=False)


def test_generated_tokens_are_reused_if_they_are_stored(runs):
    prompt, generated = 640, 200
    stored = (prompt + generated - 1) // 256 * 256  # the last token's KV is never computed
    assert runs("speculation").external("follow-up") == stored > prompt


def test_adapters_are_never_shared_and_each_finds_its_own(runs):
    keep = runs("lora")
    assert [keep.external(step) for step in ("none", "first", "second")] == [0, 0, 0]
    assert [keep.external(f"{step} again") for step in ("none", "first", "second")] == [512, 512, 512]
    answers = {tuple(keep.answers(step)[0]["tokens"]) for step in ("none", "first", "second")}
    assert len(answers) == 3, "the adapters change nothing: they test nothing"
    check_same(runs, "lora", *(f"{step}{again}" for step in ("none", "first", "second") for again in ("", " again")))


def test_an_adapter_replaced_at_the_same_path_finds_nothing_of_the_old_one(runs):
    keep = runs("lora")
    steps = ("stale", "replaced", "replaced again", "replaced once more")
    # what counts is what the engine holds, not the files; and of a request that loads its adapter nothing is known before
    assert [keep.external(step) for step in steps] == [512, 0, 0, 512]
    assert keep.answers("stale")[0]["tokens"] == keep.answers("first")[0]["tokens"]
    assert keep.answers("replaced")[0]["tokens"] != keep.answers("first")[0]["tokens"]
    assert keep.figure("miss_adapter") >= 3  # the first request of each adapter, and the one that loads one anew
    check_same(runs, "lora", *steps)


def test_an_adapter_whose_files_are_replaced_before_its_first_request_is_what_was_loaded(runs):
    keep, again = runs("early-lora"), runs("early-lora-again")
    assert [run.external(step) for run in (keep, again) for step in ("early cold", "early warm")] == [0, 512, 0, 512]
    assert keep.answers("early cold")[0]["tokens"] != again.answers("early cold")[0]["tokens"]
    assert min(run.figure("miss_adapter") for run in (keep, again)) >= 1
    for name in ("early-lora", "early-lora-again"):
        check_same(runs, name, "early cold", "early warm")


def test_neither_half_of_kvkeep_holds_an_adapter_for_longer_than_a_step(runs):
    assert runs("lora").facts["adapters held"] == [0, 0]


def test_an_adapter_on_two_ranks_finds_its_own(runs):
    keep = runs("ranks-lora")
    assert [keep.external(step) for step in ("early cold", "early warm")] == [0, 512]
    check_same(runs, "ranks-lora", "early cold", "early warm")


@pytest.mark.parametrize(("tokens", "reused"), [(500, 256), (512, 511), (1023, 768), (1024, 1023), (1030, 1024)])
def test_a_model_with_sliding_windows_reuses_all_its_groups(runs, tokens, reused):
    keep = runs("hybrid")
    assert (keep.external(f"{tokens} cold"), keep.external(f"{tokens} warm")) == (0, reused)
    check_same(runs, "hybrid", f"{tokens} cold", f"{tokens} warm")


def test_a_model_with_sliding_windows_at_length(runs):
    keep = runs("hybrid")
    assert [keep.external(step) for step in ("long answer warm", "prefix", "extension")] == [1280, 1024, 1280]
    check_same(runs, "hybrid", "long answer cold", "long answer warm", "prefix", "extension", "two at once cold")
    # its loads end beside the steps, so that two need not meet in the steps in which they do without kvkeep
    check_same(runs, "hybrid", "two at once warm", exact=False)


def test_a_real_model_answers_a_real_text_the_same(runs):
    keep, plain = runs.pair("smollm2")
    steps = ("who cold", "who warm", "what cold", "what warm")
    assert [keep.external(step) for step in steps] == [0, 1024, 1024, 1024]
    assert [plain.answers(step)[0]["cached"] for step in steps] == [0, 1024, 1024, 1024]  # compared to the bit
    check_same(runs, "smollm2", *steps)


@pytest.mark.parametrize("name", ["processes", "parallel"])
def test_other_ways_to_run_an_engine(runs, name):
    keep = runs(name)
    steps = ("whole cold", "whole warm", "extension", "two at once cold", "two at once warm")
    assert [keep.external(step) for step in steps[:4]] == [0, 1024, 1024, 0]
    assert keep.reused("two at once warm") == 1024
    # its reference runs in one process, where the matrix products are not the same to the bit
    check_same(runs, name, *steps, exact=name != "processes")


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_below_float32_a_hit_equals_vllms_own_with_the_same_recompute(runs, name):
    keep, plain = runs.pair(name)
    for step in ("whole warm", "extension", "two at once warm"):
        ours, theirs = keep.answers(step), plain.answers(step)
        assert [one["cached"] for one in ours] == [one["cached"] for one in theirs]
        assert min(one["cached"] for one in ours) >= 512
        for part in ("tokens", "logprobs"):
            assert [one[part] for one in ours] == [one[part] for one in theirs]


def test_a_prompt_larger_than_the_pool_runs_and_stores_what_fits(runs):
    keep = runs("small-pool")
    chunk_nbytes = 256 << 10
    assert keep.stats["pool_nbytes"] // chunk_nbytes == 3
    steps = ("too large cold", "too large warm", "small", "too large again")
    assert [keep.external(step) for step in steps] == [0, 256, 0, 256]  # one request may pin half the pool: one chunk
    assert keep.figure("stored_chunks") == 4  # the first three, then the small prompt's
    assert keep.stats["evictions"] == 1  # only for the small prompt, which fits
    assert keep.figure("skipped_full_chunks") == 2 + 2 + 3
    check_same(runs, "small-pool", *steps)
