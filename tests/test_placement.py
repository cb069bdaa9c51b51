"""Where the teacher's weights are, and in how many bits."""

import threading
from functools import partial

import pytest
import torch
from conftest import random_model
from torch.multiprocessing.reductions import StorageWeakRef

from opd.api import from_options
from opd.config.options import Placement
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, micro_batches
from opd.errors import ConfigError
from opd.models import load as models
from opd.models import memory
from opd.models.policy import prepare_teacher
from opd.samplers import Decoding, GenerateSampler, SamplerSpec
from opd.teachers import LocalTeacher, loading_device, place
from opd.teachers.offload import Offload
from opd.training.identity import differences

CPU = torch.device("cpu")
TINY = {"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-teacher"}


def batch():
    rollouts = [
        Rollout(Request(Prompt(0, (2, 3, 4), "")), (5, 6, 1), torch.zeros(3), FinishReason.stop),
        Rollout(Request(Prompt(1, (7,), "")), (8, 9), torch.zeros(2), FinishReason.length),
    ]
    return micro_batches(rollouts, 100, 0)[0]


def logp(teacher):
    return teacher.logp(batch().teacher_inputs, batch().ids_N, 0.7)


def sample(model):
    spec = SamplerSpec(model=model, eos=(1,), pad_id=0, vocabulary=23, seed=0, bf16=False)
    requests = [Request(Prompt(0, (2, 3, 4), ""), attempt=attempt) for attempt in range(4)]
    return [rollout.completion for rollout in GenerateSampler(spec).sample(requests, Decoding(1.0, 6), "evaluation")]


@pytest.mark.parametrize("tied", [False, True])
def test_offloaded_teacher_scores_and_samples_bitwise_the_same_and_its_weights_stay_in_place(tied):
    resident, offloaded = (prepare_teacher(random_model(tie_word_embeddings=tied), CPU) for _ in range(2))
    before = [parameter.data_ptr() for parameter in offloaded.parameters()]
    place(offloaded, Placement.offload, CPU)
    expected, teacher = LocalTeacher(resident, 23), LocalTeacher(offloaded, 23, device=CPU)
    for _ in range(2):
        with teacher.ready():
            assert torch.equal(logp(teacher), logp(expected))
        assert [parameter.data_ptr() for parameter in offloaded.parameters()] == before
        # Its evaluation samples with it, in inference mode.
        assert sample(offloaded) == sample(resident)
    inputs = batch().teacher_inputs
    assert torch.equal(teacher.states(inputs).head.weight_VH, expected.states(inputs).head.weight_VH)
    assert not any(parameter.requires_grad for parameter in offloaded.parameters())


class WatchedOffload(Offload):
    """An `Offload` that knows the memory of every copy.

    Args:
        before: Called with a layer's index before it is copied.
        during: Called with a layer's index before its MLP computes.
    """

    def __init__(self, layers, before=lambda index: None, during=lambda index: None):
        self.before, self.copies = before, {}
        for index, layer in enumerate(layers):
            layer.mlp.register_forward_pre_hook(lambda *_, index=index: during(index))
        super().__init__(layers, CPU)

    def copy(self, index, target, free):
        self.before(index)
        self.copies |= {StorageWeakRef(tensor.untyped_storage()): tensor.nbytes for tensor in target}
        return super().copy(index, target, free)

    def layers_on_device(self):
        """Return the size of all copies, in layers, which are all of one size."""
        self.copier.submit(int).result()  # the copying thread still refers to its last copy
        return sum(size for copy, size in self.copies.items() if not copy.expired()) / sum(tensor.nbytes for tensor in self.host[0])


def test_next_layer_is_copied_while_one_computes_and_no_copy_stays():
    model = prepare_teacher(random_model(num_hidden_layers=5), CPU)
    expected, computed, counts = model(torch.arange(9)[None]).logits, [threading.Event() for _ in range(5)], []

    def before(index):
        """Copy a layer only after the one before it began to compute: it would never begin if it waited for this copy."""
        assert index == 0 or computed[index - 1].wait(10)

    def during(index):
        computed[index].set()
        counts.append(offload.layers_on_device())

    offload = WatchedOffload(model.model.layers, before, during)
    for _ in range(2):
        assert torch.equal(model(torch.arange(9)[None]).logits, expected)
        assert offload.layers_on_device() == 0
    assert counts == [2, 2, 2, 2, 1] * 2 and len(offload.copies) == 2 * 2 * 12


def test_out_of_memory_while_copying_is_raised_by_the_layer_and_the_next_pass_is_right():
    model = prepare_teacher(random_model(num_hidden_layers=4), CPU)
    expected, faults = model(torch.arange(9)[None]).logits, {"copy": 1, "compute": 2}

    def fail(kind, index):
        if index == faults.get(kind):
            del faults[kind]
            raise torch.OutOfMemoryError(kind)

    offload = WatchedOffload(model.model.layers, partial(fail, "copy"), partial(fail, "compute"))
    for kind in ("copy", "compute"):
        with pytest.raises(torch.OutOfMemoryError, match=kind):
            model(torch.arange(9)[None])
        assert offload.layers_on_device() == 0 and offload.pending is None
        for parameters, host in zip(offload.parameters, offload.host, strict=True):
            assert [parameter.data_ptr() for parameter in parameters] == [tensor.data_ptr() for tensor in host]
    assert faults == {} and torch.equal(model(torch.arange(9)[None]).logits, expected)


def test_layers_called_out_of_order_and_layers_that_share_weights_compute_the_same():
    resident, offloaded = (prepare_teacher(random_model(num_hidden_layers=4), CPU) for _ in range(2))
    for model in (resident, offloaded):
        model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    place(offloaded, Placement.offload, CPU)
    for model in (resident, offloaded):
        model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in (1, 0, 3, 3)])
    ids = torch.arange(9)[None]
    assert torch.equal(offloaded(ids, use_cache=False).logits, resident(ids, use_cache=False).logits)


def test_layers_with_shared_or_quantised_weights_are_not_offloaded():
    shared = prepare_teacher(random_model(), CPU)
    shared.model.norm.weight = shared.model.layers[0].input_layernorm.weight
    with pytest.raises(ConfigError, match=r"teacher\.placement=offload: .*share weights.*teacher\.placement=same"):
        place(shared, Placement.offload, CPU)
    small = prepare_teacher(random_model(), CPU)
    small.model.layers[0].mlp.up_proj.weight = type("Params4bit", (torch.nn.Parameter,), {})(torch.zeros(32, 16), requires_grad=False)
    with pytest.raises(ConfigError, match=r"teacher\.placement=offload: .*quantised.*teacher\.placement=same"):
        place(small, Placement.offload, CPU)


def test_scores_of_a_teacher_on_another_device_are_moved_to_that_of_the_student():
    """`meta` stands for the student's device, where nothing is computed here."""
    teacher = LocalTeacher(prepare_teacher(random_model(), CPU), 23, device=torch.device("meta"))
    states = teacher.states(batch().teacher_inputs)
    assert (states.hidden_NH.device.type, states.head.weight_VH.device.type) == ("meta", "meta")
    assert teacher.model.device.type == "cpu"


def test_loading_device_of_the_teacher_follows_its_placement():
    config = from_options({**TINY, "teacher.placement": "device", "teacher.device": "cpu"}).teacher
    assert loading_device(config, torch.device("cuda"), 1, sharded=False) == CPU
    offloaded = from_options({**TINY, "teacher.placement": "offload"}).teacher
    assert loading_device(offloaded, torch.device("cuda"), 8, sharded=False) == CPU
    with pytest.raises(ConfigError, match=r"teacher\.placement=sharded: .*launch\.config_file=.*fsdp2.*teacher\.placement=same"):
        loading_device(from_options({**TINY, "teacher.placement": "sharded"}).teacher, CPU, 2, sharded=False)
    on_gpu = from_options({**TINY, "teacher.placement": "device", "teacher.device": "cuda:77"}).teacher
    with pytest.raises(ConfigError, match=r"teacher\.device=cuda:77: torch sees \d+ GPUs"):
        loading_device(on_gpu, CPU, 1, sharded=False)
    with pytest.raises(ConfigError, match=r"teacher\.device=cuda:77: .*teacher\.placement=offload"):
        loading_device(on_gpu, CPU, 2, sharded=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher.placement": "device"}, r"teacher\.device=None"),
        ({"teacher.device": "cuda:1"}, r"^teacher\.device='cuda:1': .*teacher\.placement=device"),
        ({"teacher.placement": "device", "teacher.device": "cuda"}, r"^teacher\.device=.?cuda.?: .*cuda:1"),
        ({"teacher.placement": "offload", "teacher.quantization": "nf4"}, r"^teacher\.quantization=nf4: .*teacher\.placement=same"),
        ({"teacher.quantization": "int8", "teacher.gguf_file": "x.gguf"}, r"^teacher\.quantization=int8: .*teacher\.gguf_file"),
        (
            {"teacher.placement": "offload", "teacher.path": "m", "model.path": "m", "lora.rank": 4, "teacher.system": "s"},
            r"^teacher\.placement=offload: .*teacher\.placement=same",
        ),
    ],
)
def test_combinations_without_a_meaning_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        from_options({**TINY, **options})


def test_resumed_run_may_move_its_teacher_but_not_quantise_it():
    assert differences({"teacher": {"placement": "same"}}, {"teacher": {"placement": "offload"}}) == []
    assert differences({"teacher": {"quantization": "none"}}, {"teacher": {"quantization": "nf4"}}) != []


def test_quantisation_without_bitsandbytes_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    config = from_options({**TINY, "teacher.quantization": "nf4"}).teacher
    with pytest.raises(ConfigError, match=r"teacher\.quantization=nf4 .*pip install 'opd\[quantized\]'"):
        models.load_model(config, "teacher", CPU)


@pytest.mark.parametrize(("quantization", "furthest"), [("int8", 0.2), ("nf4", 0.2)])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantised_teacher_is_smaller_and_nearly_the_same(quantization, furthest):
    pytest.importorskip("bitsandbytes")
    config = from_options({**TINY, "teacher.quantization": quantization})
    whole = prepare_teacher(models.load_model(from_options(TINY).teacher, "teacher", CPU), CPU)
    small = prepare_teacher(models.load_model(config.teacher, "teacher", CPU), CPU)
    kl = (whole(torch.arange(20)[None]).logits.log_softmax(-1), small(torch.arange(20)[None]).logits.log_softmax(-1))
    assert 0 < float((kl[0].exp() * (kl[0] - kl[1])).sum(-1).mean()) < furthest
    estimated = memory.estimate(config, 1, CPU).resident["teacher"]
    assert estimated == pytest.approx(small.get_memory_footprint(), rel=0.1)  # which leaves out the scales of nf4
    assert estimated < 0.3 * whole.get_memory_footprint()
