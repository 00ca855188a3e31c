"""What one replica can do: the constants of the engine model, each profile with its source.

Not here: how they are used (engine). A constant is either measured by somebody and cited, or follows from the model's and the GPU's data
sheet by the arithmetic given; none is fitted to what a policy should look like.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench import BenchError


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one kind of replica. A step of the engine takes

    base + prefill_token * tokens + attention_pair * (token, earlier token) pairs + sequence * sequences + kv_token * context in decode.
    """

    name: str
    source: str
    kv_tokens: int
    """Tokens of KV cache."""
    step_base_s: float
    """Reading the weights, and launching."""
    prefill_token_s: float
    attention_pair_s: float
    """For each pair of a prompt token being computed and one before it: what makes long prompts cost more than their length."""
    sequence_s: float
    """For each sequence in the step: sampling, detokenizing, scheduling."""
    kv_token_s: float
    """For each token of context of each decoding sequence: reading its KV."""
    offload_token_s: float = 3e-6
    """Bringing one token's KV back from CPU memory."""
    batch_tokens: int = 2_048
    """Tokens computed in one step at most (chunked prefill)."""
    running_max: int = 256
    """Sequences in a step at most."""

    def __post_init__(self) -> None:
        if min(self.step_base_s, self.prefill_token_s) <= 0 or min(self.attention_pair_s, self.sequence_s, self.kv_token_s) < 0:
            raise ValueError(f"{self.name}: times must be above 0")
        if min(self.kv_tokens, self.running_max) < 1 or self.batch_tokens <= self.running_max:
            raise ValueError(f"{self.name}: kv_tokens and running_max are at least 1, and batch_tokens is above running_max")

    @property
    def prefill_tokens_per_s(self) -> float:
        """At the peak: full steps, nothing else in them, no context before."""
        return self.batch_tokens / (self.step_base_s + self.batch_tokens * self.prefill_token_s + self.sequence_s)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="qwen3-32b-2xh100",
            source=(
                "The reference picker's published figures for Qwen3-32B on 2 H100: 15 928 tokens/s of prefill at the peak, 307 328 tokens of "
                "KV cache. Weights: 65.5 GB in bf16 at 6.7 TB/s = 9.8 ms a step. A 2 048-token step at the peak takes 128.6 ms, so 57.9 us "
                "a token. KV: 64 layers x 2 x 8 heads x 128 x 2 B = 262 KB a token at 80 % of 6.7 TB/s = 49 ns. Attention: "
                "4 x 64 heads x 128 x 64 layers = 2.1 MFLOP a pair at 1.05 PFLOP/s (53 % of the peak, what the prefill figure implies) = 2 ns. "
                "CPU memory: 262 KB a token over 2 x PCIe 5 x16 at 45 GB/s = 2.9 us."
            ),
            kv_tokens=307_328,
            step_base_s=9.8e-3,
            prefill_token_s=57.9e-6,
            attention_pair_s=2.0e-9,
            sequence_s=50e-6,
            kv_token_s=49e-9,
        ),
        Profile(
            name="llama-8b-h100",
            source=(
                "Llama-3.1-8B on one H100, from data sheets: weights 16 GB in bf16 at 3.35 TB/s = 4.8 ms a step; 16 GFLOP a token at 50 % of "
                "989 TFLOP/s = 32 us; KV 32 layers x 2 x 8 x 128 x 2 B = 131 KB a token at 80 % of 3.35 TB/s = 49 ns, 50 GB of it = 381k tokens; "
                "attention 4 x 32 x 128 x 32 = 0.52 MFLOP a pair at 500 TFLOP/s = 1 ns. llm-d-inference-sim's profile 8b-h100-balanced "
                "(TTFT 30 ms + 250 us a token, 12 ms between tokens) is slower throughout: it stands for a shared machine."
            ),
            kv_tokens=381_000,
            step_base_s=4.8e-3,
            prefill_token_s=32e-6,
            attention_pair_s=1.0e-9,
            sequence_s=40e-6,
            kv_token_s=49e-9,
        ),
        Profile(
            name="sim-8b-h100-balanced",
            source=(
                "llm-d-inference-sim, manifests/latency-profiles, 8b-h100-balanced: TTFT 30 ms + 250 us a token, 12 ms between tokens, twice "
                "that at its 16 sequences: 0.75 ms a sequence. KV 131 072 tokens is a choice; no attention term there."
            ),
            kv_tokens=131_072,
            step_base_s=12e-3,
            prefill_token_s=250e-6,
            attention_pair_s=0.0,
            sequence_s=750e-6,
            kv_token_s=0.0,
            running_max=16,
        ),
        Profile(
            name="sim-small-l40s-edge",
            source=(
                "llm-d-inference-sim, manifests/latency-profiles, small-l40s-edge: TTFT 20 ms + 350 us a token, 15 ms between tokens, 1.5 "
                "times that at its 4 sequences: 1.9 ms a sequence. KV 65 536 tokens is a choice; no attention term there."
            ),
            kv_tokens=65_536,
            step_base_s=15e-3,
            prefill_token_s=350e-6,
            attention_pair_s=0.0,
            sequence_s=1.9e-3,
            kv_token_s=0.0,
            running_max=4,
        ),
    )
}
DEFAULT_PROFILE = "qwen3-32b-2xh100"


def profile_of(name: str) -> Profile:
    """Raises BenchError with the names there are."""
    try:
        return PROFILES[name]
    except KeyError:
        raise BenchError(f"no profile is named {name!r}: {', '.join(PROFILES)}") from None
