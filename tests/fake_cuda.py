"""Run the code of a step on fake CUDA tensors, which have a shape and a device but no data. A mix of two devices in one operation raises
there, and so does reading a value, for which a GPU would be waited for.

python tests/fake_cuda.py GUARD: a shared library of `GUARD_SOURCE`, without which a CPU build of torch refuses CUDA tensors.
"""

import ctypes
import sys
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

GUARD_SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
"""
CUDA = torch.device("cuda:0")


def main(guard: str) -> None:
    ctypes.CDLL(guard)
    torch.inference_mode = lambda *arguments: torch.no_grad()  # fake tensors have no inference mode
    torch.cuda.graph_pool_handle = lambda: None

    from conftest import random_model
    from training_helpers import VOCABULARY, config, rollout_of

    from opd.models.policy import output_head, predicting_hidden
    from opd.objective import logp, masked_stats
    from opd.samplers import Decoding, GenerateSampler, SamplerSpec
    from opd.samplers.generate import choose
    from opd.samplers.line import DecodeLines, grouped, keys_and_values
    from opd.teachers import LocalTeacher
    from opd.training.step import Step
    from opd.training.tokens import Tokens

    logp.has_kernels = lambda: False
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, CUDA:
        student = random_model(VOCABULARY, seed=1)
        torch.set_default_dtype(torch.bfloat16)
        teacher = random_model(VOCABULARY, seed=2, hidden=24).requires_grad_(False)
        torch.set_default_dtype(torch.float32)

    prompts = [SimpleNamespace(ids=ids) for ids in ((3, 4), (5,), (6, 7, 8), (9,))]
    for name, decoding in (("sampled", Decoding(1.0, 8)), ("greedy", Decoding(0.0, 8)), ("top", Decoding(0.7, 8, 0.9, 5))):
        with mode, torch.no_grad():
            spec = SamplerSpec(model=student, eos=(1,), pad_id=0, vocabulary=VOCABULARY, seed=0, bf16=False)
            sampler = GenerateSampler(spec)
            cache, logits_BV, mask_BT = sampler.prefill(prompts)
            uniforms_BT = torch.rand(4, 8, dtype=torch.float64, device=CUDA)
            lines = DecodeLines(student, sampler.next_logits, decoding, sampler.eos, keys_and_values(cache), logits_BV, 4, 3)
            lines.load(keys_and_values(cache), mask_BT, logits_BV, uniforms_BT)
            with grouped(student):
                lines.line(4).compute()
                lines.keep(torch.tensor([0, 2], device=CUDA), 2)
                lines.line(2).compute()
            drawn_B, _ = choose(logits_BV, uniforms_BT[:, 0], decoding)
            mask_BT = torch.cat((mask_BT, mask_BT.new_ones(4, 1)), -1)
            sampler.next_logits(drawn_B[:, None], mask_BT, mask_BT.sum(-1, keepdim=True), cache)
        print("decode", name, lines.line(2).own.logits.device)

    accelerator = SimpleNamespace(device=CUDA, num_processes=1)
    for options in ({}, {"ppo__baseline": True}, {"ppo__estimator": "exact"}, {"ppo__estimator": "topk"}):
        with mode, torch.no_grad():  # the backward pass needs a driver
            step = Step(
                config=config(**options),
                strategy=SimpleNamespace(accelerator=accelerator),
                teacher=LocalTeacher(teacher, VOCABULARY, device=CUDA),
                pad_id=0,
                packed=False,
                choices={"max_tokens": 100},
            )
            tokens = Tokens([rollout_of((3, 4), (5, 6, 1)), rollout_of((7,), (8, 1), index=1)], CUDA)
            step.score_slices(tokens)
            [part] = tokens.slices
            logits_NV = output_head(student, VOCABULARY).logits(predicting_hidden(student.base_model, part.batch.inputs))
            loss_N, stats = step.token_loss(tokens, part)(logits_NV, slice(0, 5))
        assert {tensor.device for tensor in (loss_N, *stats.values())} == {CUDA}
        print("update", options)

    masked = torch.tensor([3, 7])  # on a teacher's own device, and on the student's
    for where in (torch.device("cpu"), CUDA):
        with mode, where:
            torch.set_default_dtype(torch.bfloat16)
            teacher = random_model(VOCABULARY, seed=2, hidden=24).requires_grad_(False)
            torch.set_default_dtype(torch.float32)
        with mode, torch.no_grad():
            scorer = LocalTeacher(teacher, VOCABULARY - 2, device=CUDA, masked=masked.to(CUDA))
            columns = scorer.columns(part.batch.inputs, part.batch.ids_N, 0.7)
            head = output_head(student, VOCABULARY - 2, masked=masked.to(CUDA))
            hidden_NH = predicting_hidden(student.base_model, part.batch.inputs)
            columns |= masked_stats("student", hidden_NH, head, part.batch.ids_N, columns["teacher_logp"], 0.7)
        assert len(columns) == 5 and {tensor.device for tensor in columns.values()} == {CUDA}
        print("masked", where)


if __name__ == "__main__":
    main(sys.argv[1])
