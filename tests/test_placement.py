"""Where the teacher's weights are, and in how many bits."""

import threading
from functools import partial

import pytest
import torch
from conftest import random_model
from torch.multiprocessing.reductions import StorageWeakRef

from opd.api import from_options
from opd.config.schema import Engine, Placement
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, micro_batches
from opd.errors import ConfigError
from opd.models import load as models
from opd.models import memory
from opd.models.policy import prepare_teacher
from opd.samplers import Decoding, GenerateSampler
from opd.teachers import LocalTeacher, home, place
from opd.teachers.offload import Offload
from opd.training.build import overlaps
from opd.training.identity import differences

CPU = torch.device("cpu")
TINY = {"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-teacher"}


def batch():
    rollouts = [
        Rollout(Request(Prompt(0, (2, 3, 4), "")), (5, 6, 1), torch.zeros(3), FinishReason.stop),
        Rollout(Request(Prompt(1, (7,), "")), (8, 9), torch.zeros(2), FinishReason.length),
    ]
    return micro_batches(rollouts, 100, 0)[0]


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_teacher_says_bitwise_the_same_and_its_weights_stay_where_they_were(tied):
    here, away = (prepare_teacher(random_model(tie_word_embeddings=tied), CPU) for _ in range(2))
    before = [parameter.data_ptr() for parameter in away.parameters()]
    place(away, Placement.offload, CPU)
    expected, found = LocalTeacher(here, 23), LocalTeacher(away, 23, device=CPU)
    for _ in range(2):
        with found.ready():
            assert torch.equal(found.logp(batch(), 0.7), expected.logp(batch(), 0.7))
        assert [parameter.data_ptr() for parameter in away.parameters()] == before
        # An evaluation lets the teacher write, too, which is in inference mode.
        requests = [Request(Prompt(0, (2, 3, 4), ""), attempt=attempt) for attempt in range(4)]
        here_wrote, away_wrote = (
            GenerateSampler(model, (1,), 0, 23, seed=0, bf16=False).sample(requests, Decoding(1.0, 6), "evaluation")
            for model in (here, away)
        )
        assert [rollout.completion for rollout in here_wrote] == [rollout.completion for rollout in away_wrote]
    assert torch.equal(found.states(batch()).head.weight_VH, expected.states(batch()).head.weight_VH)
    assert not any(parameter.requires_grad for parameter in away.parameters())


class Watched(Offload):
    """Knows the memory of every copy. before, during: called with a layer's number ahead of copying it and ahead of its computing."""

    def __init__(self, layers, before=lambda index: None, during=lambda index: None):
        self.before, self.copies = before, {}
        for index, layer in enumerate(layers):
            layer.mlp.register_forward_pre_hook(lambda *_, index=index: during(index))
        super().__init__(layers, CPU)

    def copy(self, index, place, free):
        self.before(index)
        self.copies |= {StorageWeakRef(tensor.untyped_storage()): tensor.nbytes for tensor in place}
        return super().copy(index, place, free)

    def held(self):
        """Copies that exist, in layers, which are all of one size."""
        self.copier.submit(int).result()  # the thread has let go of its last one
        return sum(size for copy, size in self.copies.items() if not copy.expired()) / sum(tensor.nbytes for tensor in self.host[0])


def test_the_next_layer_is_copied_while_one_computes_and_nothing_stays():
    model = prepare_teacher(random_model(num_hidden_layers=5), CPU)
    expected, computed, held = model(torch.arange(9)[None]).logits, [threading.Event() for _ in range(5)], []

    def before(index):
        """A layer is not copied before the one ahead of it computes: were it waited for, that one never would."""
        assert index == 0 or computed[index - 1].wait(10)

    def during(index):
        computed[index].set()
        held.append(offload.held())

    offload = Watched(model.model.layers, before, during)
    for _ in range(2):
        assert torch.equal(model(torch.arange(9)[None]).logits, expected)
        assert offload.held() == 0
    assert held == [2, 2, 2, 2, 1] * 2 and len(offload.copies) == 2 * 2 * 12


def test_what_copying_raises_is_raised_by_the_layer_and_the_next_pass_is_right():
    model = prepare_teacher(random_model(num_hidden_layers=4), CPU)
    expected, faults = model(torch.arange(9)[None]).logits, {"copy": 1, "compute": 2}

    def fail(kind, index):
        if index == faults.get(kind):
            del faults[kind]
            raise torch.OutOfMemoryError(kind)

    offload = Watched(model.model.layers, partial(fail, "copy"), partial(fail, "compute"))
    for kind in ("copy", "compute"):
        with pytest.raises(torch.OutOfMemoryError, match=kind):
            model(torch.arange(9)[None])
        assert offload.held() == 0 and offload.coming is None
        assert [[p.data_ptr() for p in own] for own in offload.parameters] == [[t.data_ptr() for t in own] for own in offload.host]
    assert faults == {} and torch.equal(model(torch.arange(9)[None]).logits, expected)


def test_layers_out_of_turn_and_layers_that_share_weights_compute_the_same():
    here, away = (prepare_teacher(random_model(num_hidden_layers=4), CPU) for _ in range(2))
    for model in (here, away):
        model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    place(away, Placement.offload, CPU)
    for model in (here, away):
        model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in (1, 0, 3, 3)])
    assert torch.equal(away(torch.arange(9)[None], use_cache=False).logits, here(torch.arange(9)[None], use_cache=False).logits)


def test_layers_that_are_not_plain_weights_of_their_own_are_not_offloaded():
    shared = prepare_teacher(random_model(), CPU)
    shared.model.norm.weight = shared.model.layers[0].input_layernorm.weight
    with pytest.raises(ConfigError, match="share weights with its other parts; take same"):
        place(shared, Placement.offload, CPU)
    small = prepare_teacher(random_model(), CPU)
    small.model.layers[0].mlp.up_proj.weight = type("Params4bit", (torch.nn.Parameter,), {})(torch.zeros(32, 16), requires_grad=False)
    with pytest.raises(ConfigError, match="a quantised teacher stay where they are; take same"):
        place(small, Placement.offload, CPU)


def test_a_teacher_on_another_device_answers_on_the_students():
    """Another device of the same kind is not there: `meta` stands for the student's, which nothing is computed on."""
    teacher = LocalTeacher(prepare_teacher(random_model(), CPU), 23, device=torch.device("meta"))
    states = teacher.states(batch())
    assert (states.hidden_NH.device.type, states.head.weight_VH.device.type) == ("meta", "meta")
    assert teacher.model.device.type == "cpu"


def test_where_the_teacher_is_loaded():
    config = from_options({**TINY, "teacher.placement": "device", "teacher.device": "cpu"}).teacher
    assert home(config, torch.device("cuda"), 1, sharded=False) == CPU
    offloaded = from_options({**TINY, "teacher.placement": "offload"}).teacher
    assert home(offloaded, torch.device("cuda"), 8, sharded=False) == CPU
    with pytest.raises(ConfigError, match=r"teacher\.placement=sharded: .* FSDP2 or ZeRO-3 config"):
        home(from_options({**TINY, "teacher.placement": "sharded"}).teacher, CPU, 2, sharded=False)
    on_gpu = from_options({**TINY, "teacher.placement": "device", "teacher.device": "cuda:77"}).teacher
    with pytest.raises(ConfigError, match=r"teacher\.device=cuda:77: torch sees \d+ GPUs here"):
        home(on_gpu, CPU, 1, sharded=False)
    with pytest.raises(ConfigError, match="all 2 processes would use it"):
        home(on_gpu, CPU, 2, sharded=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher.placement": "device"}, r"teacher\.device=None: .*teacher\.device=cuda:1"),
        ({"teacher.device": "cuda:1"}, r"teacher\.device='cuda:1': .*teacher\.placement=device"),
        ({"teacher.placement": "device", "teacher.device": "cuda"}, r"teacher\.device='cuda': .*cuda:1"),
        ({"teacher.placement": "offload", "teacher.quantization": "nf4"}, r"teacher\.quantization=nf4: .*teacher\.placement=same"),
        ({"teacher.quantization": "int8", "teacher.gguf_file": "x.gguf"}, r"teacher\.gguf_file.*teacher\.quantization=none"),
        (
            {"teacher.placement": "offload", "teacher.path": "m", "model.path": "m", "lora.rank": 4, "teacher.system": "s"},
            r"teacher\.placement=offload: .*teacher\.placement=same",
        ),
    ],
)
def test_combinations_without_a_meaning_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        from_options({**TINY, **options})


def test_a_run_goes_on_with_its_teacher_elsewhere_but_not_in_other_bits():
    assert differences({"teacher": {"placement": "same"}}, {"teacher": {"placement": "offload"}}) == []
    assert differences({"teacher": {"quantization": "none"}}, {"teacher": {"quantization": "nf4"}}) != []


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    config = from_options({**TINY, "teacher.quantization": "nf4"}).teacher
    with pytest.raises(ConfigError, match=r"bitsandbytes: pip install 'opd\[quantized\]'"):
        models.load_model(config, "teacher", CPU)


@pytest.mark.parametrize(("quantization", "furthest"), [("int8", 0.2), ("nf4", 0.2)])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_quantised_teacher_is_smaller_and_nearly_the_same(quantization, furthest):
    pytest.importorskip("bitsandbytes")
    config = from_options({**TINY, "teacher.quantization": quantization})
    whole = prepare_teacher(models.load_model(from_options(TINY).teacher, "teacher", CPU), CPU)
    small = prepare_teacher(models.load_model(config.teacher, "teacher", CPU), CPU)
    kl = (whole(torch.arange(20)[None]).logits.log_softmax(-1), small(torch.arange(20)[None]).logits.log_softmax(-1))
    assert 0 < float((kl[0].exp() * (kl[0] - kl[1])).sum(-1).mean()) < furthest
    told = memory.estimate(config, 1, CPU).resident["teacher"]
    assert told == pytest.approx(small.get_memory_footprint(), rel=0.1)  # which leaves out the scales of nf4
    assert told < 0.3 * whole.get_memory_footprint()


def test_the_teacher_scores_beside_the_sampler_only_from_a_device_of_its_own():
    apart = from_options({**TINY, "teacher.placement": "device", "teacher.device": "cpu"})
    cuda = torch.device("cuda", 0)
    assert overlaps(apart, Engine.generate, CPU, cuda)
    assert not overlaps(apart, Engine.generate, CPU, CPU)
    assert not overlaps(apart, Engine.vllm, CPU, cuda)
    assert not overlaps(from_options(TINY), Engine.generate, cuda, cuda)
    assert not overlaps(from_options({**TINY, "teacher.placement": "offload"}), Engine.generate, CPU, cuda)
    whole = {**TINY, "teacher.placement": "device", "teacher.device": "cpu", "ppo.estimator": "exact"}
    assert not overlaps(from_options(whole), Engine.generate, CPU, cuda)
