"""Live against simulated: the same requests and policy over mock engine processes and over the simulator.

The simulated engines have the constants that `sage-llm profile` finds on a live one, so that what a step costs beside the simulated
device (Python, the wire, a sleep that ends late) is in them; with `--nominal`, those that the mock device is told.

Near saturation a single run says little: another order of two events sends requests elsewhere, and the share of good ones moves by points. So
there is a run for each of `--seeds`, paired with the simulation of the same requests; what is compared is the mean of the differences, with its
95 % confidence interval (Student's t). With `--add FILE` the runs of several calls are taken together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec

from sagellm_control_plane.config import SLO, AdmissionConfig, CoreConfig
from sagellm_control_plane.live.lifecycle import EngineSpec
from sagellm_control_plane.live.process_driver import ProcessDriver, ProcessOptions
from sagellm_control_plane.manager import ControlPlaneManager
from sagellm_control_plane.sim.cluster import simulate
from sagellm_control_plane.sim.engine_model import EngineConstants
from sagellm_control_plane.sim.profile import profile_engine
from sagellm_control_plane.sim.traces import SimRequest, poisson
from sagellm_core.config import EngineConfig, Limits, MockOptions
from sagellm_core.text.bytes_model import ByteChatModel
from sagellm_protocol.errors import SageError
from sagellm_protocol.generation import ChoiceDelta, GenerationRequest
from sagellm_protocol.sampling import SamplingParams

MOCK = MockOptions(base_ms=25.0, prefill_us=400.0, sequence_us=1000.0)
CONSTANTS = EngineConstants(
    prefill_tps=2500.0, step_s=0.025, per_sequence_s=0.001, per_token_s=0.0, step_tokens=256, oldest_share=0.25,
    max_sequences=16, block_size=16, n_blocks=4096,
)  # fmt: skip
TTFT_S, TPOT_S = 1.0, 0.08
OBJECTIVE = SLO(ttft_s=TTFT_S, tpot_s=TPOT_S)


class Catalog:
    def models(self):
        return ["sim"]

    def engine_spec(self, model_id, engine_id, options):  # noqa: ARG002 - the port has it
        limits = Limits(parallel=16, n_ctx=4096, max_batch_tokens=256)
        config = EngineConfig(model="mock", model_id=model_id, engine_id=engine_id, limits=limits, mock=MOCK)
        return EngineSpec(engine_id=engine_id, model_id=model_id, config=msgspec.to_builtins(config))

    def chat_model(self, model_id):
        return ByteChatModel(model_id, 4096)


def argv(spec, socket):
    config = msgspec.json.encode(spec.config).decode()
    return [sys.executable, "-m", "sagellm_core.server", "--config", config, "--socket", socket]


@asynccontextmanager
async def fleet(policy: str, engines: int) -> AsyncIterator[ControlPlaneManager]:
    with tempfile.TemporaryDirectory() as folder:
        options = ProcessOptions(run_dir=Path(folder, "r"), log_dir=Path(folder, "l"))
        config = CoreConfig(routing_strategy=policy, slo=OBJECTIVE, admission=AdmissionConfig(max_waiting=10**9))
        manager = ControlPlaneManager(config=config, driver=ProcessDriver(argv, options), catalog=Catalog(), seed=0)
        await manager.start()
        try:
            await asyncio.gather(*(manager.request_engine_startup("sim", f"e{i}") for i in range(engines)))
            yield manager
        finally:
            await manager.stop()


async def profiled(engines: int) -> EngineConstants:
    async with fleet("round_robin", engines) as manager:
        found = await asyncio.gather(*(profile_engine(manager.engine_client(f"e{i}")) for i in range(engines)))
    return msgspec.structs.replace(
        CONSTANTS,
        prefill_tps=statistics.median(one.prefill_tps for one in found),
        step_s=statistics.median(one.step_s for one in found),
        per_sequence_s=statistics.median(one.per_sequence_s for one in found),
    )


async def live(requests: list[SimRequest], policy: str, engines: int) -> float:
    good = 0
    async with fleet(policy, engines) as manager:
        began = time.monotonic()

        async def one(serial: int, request: SimRequest) -> None:
            nonlocal good
            await asyncio.sleep(max(began + request.at - time.monotonic(), 0.0))
            sampling = SamplingParams(max_tokens=request.output_tokens, seed=serial, ignore_eos=True)
            text = f"{serial:06d}" + "x" * max(request.prompt_tokens - 7, 0)
            ask = GenerationRequest(request_id=f"q{serial}", model="sim", prompt=text, sampling=sampling)
            sent, first, last = time.monotonic(), 0.0, 0.0
            try:
                async with aclosing(manager.generate(ask)) as events:
                    async for event in events:
                        if isinstance(event, ChoiceDelta) and event.token_ids:
                            last = time.monotonic()
                            first = first or last
            except SageError:
                return
            pace = (last - first) / max(request.output_tokens - 1, 1)
            good += first - sent <= TTFT_S and pace <= TPOT_S

        await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))
    return good / len(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rates", default="6,12,18")
    parser.add_argument("--policies", default="round_robin,load_balanced")
    parser.add_argument("--seeds", default="3", help="of the arrivals, with commas: a run each")
    parser.add_argument("--add", type=Path, metavar="FILE", help="add the runs to this file, and sum all of it up")
    parser.add_argument("--nominal", action="store_true")
    options = parser.parse_args()
    constants = CONSTANTS if options.nominal else asyncio.run(profiled(options.engines))
    print(
        f"prefill {constants.prefill_tps:.0f} tokens/s, step {constants.step_s * 1e3:.1f} ms, "
        f"{constants.per_sequence_s * 1e3:.2f} ms a sequence",
        flush=True,
    )
    rows = []
    for rate in map(float, options.rates.split(",")):
        for seed in map(int, options.seeds.split(",")):
            requests = poisson(rate, options.requests, prompt_tokens=300, output_tokens=40, seed=seed)
            requests = [msgspec.structs.replace(r, prompt_tokens=min(r.prompt_tokens, 3000)) for r in requests]
            for policy in options.policies.split(","):
                config = CoreConfig(
                    routing_strategy=policy, slo=OBJECTIVE, admission=AdmissionConfig(max_waiting=10**9)
                )
                result = simulate(requests, config, engines=options.engines, constants=constants)
                simulated = result.goodput(TTFT_S, TPOT_S)
                measured = asyncio.run(live(requests, policy, options.engines))
                print(f"{rate:g}/s, {policy}, seed {seed}: simulated {simulated:.3f}, live {measured:.3f}", flush=True)
                rows.append([rate, policy, simulated, measured])
    if options.add is not None:
        with options.add.open("a+", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.seek(0)
            rows = [json.loads(line) for line in file]
    summary(rows)


def summary(rows: list[list]) -> None:
    for rate, policy in sorted({(row[0], row[1]) for row in rows}):
        pairs = [row[2:] for row in rows if row[:2] == [rate, policy]]
        differences = [100 * (measured - simulated) for simulated, measured in pairs]
        simulated, measured = (statistics.mean(column) for column in zip(*pairs, strict=True))
        error = half_width(differences)
        print(
            f"{rate:g} requests/s, {policy}: simulated {simulated:.3f}, live {measured:.3f}, "
            f"{statistics.mean(differences):+.1f} +-{error:.1f} points over {len(pairs)} runs"
        )


#: Student's t at 97.5 %, by degrees of freedom.
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)


def half_width(values: list[float]) -> float:
    """Half of the 95 % confidence interval of the mean."""
    if len(values) < 2:
        return float("nan")
    factor = T975[min(len(values) - 2, len(T975) - 1)]
    return factor * statistics.stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    main()
