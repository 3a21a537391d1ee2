"""What a model is trained to predict, by its scheduler; conditions that go with their images; a variance that is left alone."""

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn

from tdq_utils import restore
from tdq_utils.errors import TDQError
from tdq_utils.fit import finetuning
from tdq_utils.fit.finetuning import finetune
from tdq_utils.fit.loop import denoising_loss, iteration_generator

EULER = diffusers.EulerDiscreteScheduler(
    prediction_type="v_prediction", interpolation_type="linear"
)  # its add_noise is not DDPM's
UNIPC = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
SCHEDULERS = [DDPMScheduler(), DDIMScheduler(prediction_type="v_prediction"), DDIMScheduler(prediction_type="sample"), EULER,
              diffusers.DPMSolverMultistepScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0), UNIPC]  # fmt: skip


class Oracle(nn.Module):
    """Answers right, for images whose every pixel is a tenth of their label; beside the answer, a variance."""

    def __init__(self, scheduler, unit=1.0):
        super().__init__()
        self.scheduler, self.unit, self.weight = scheduler, unit, nn.Parameter(torch.zeros(()))
        self.alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod

    def forward(self, sample, class_labels, timestep):  # the second argument is not the time
        t, x_0 = (v.view(-1, 1, 1, 1) for v in (timestep * self.unit, class_labels / 10))
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) or self.scheduler is UNIPC:
            answer = (sample - x_0) / (t / 1000)
        else:
            a, b = self.alphas[t.long()] ** 0.5, (1 - self.alphas[t.long()]) ** 0.5
            eps = (sample - a * x_0) / b
            kind = self.scheduler.config.prediction_type
            answer = {"epsilon": eps, "sample": x_0 + 0 * eps, "v_prediction": a * eps - b * x_0}[kind]
        return SimpleNamespace(sample=torch.cat([answer, torch.full_like(answer, 7)], 1) + self.weight)


@pytest.fixture
def labelled():
    labels = torch.arange(10)
    return (labels / 10).view(-1, 1, 1, 1).expand(10, 1, 4, 4).clone(), {"class_labels": labels}


def loss_of(model, images, scheduler, condition, **options):
    return denoising_loss(model, images, scheduler, 64, iteration_generator(0, 0), condition=condition, **options)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: f"{type(s).__name__}-{s.config.get('prediction_type')}")
def test_the_right_answer_has_no_loss_and_another_has(scheduler, labelled):
    images, condition = labelled
    oracle = Oracle(scheduler)
    assert loss_of(oracle, images, scheduler, condition) < 1e-6
    assert loss_of(oracle, images, scheduler, {"class_labels": condition["class_labels"].flip(0)}) > 1e-3  # rows of other images
    with torch.no_grad():
        oracle.weight += 1
    torch.testing.assert_close(loss_of(oracle, images, scheduler, condition), torch.tensor(1.0))
    right = Oracle(scheduler)
    torch.testing.assert_close(
        loss_of(oracle, images, scheduler, condition, teacher=right, distill=1.0), torch.tensor(1.0)
    )  # the teacher's variance, too, is left out


@pytest.mark.parametrize("kind", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_a_family_is_told_t_as_its_pipeline_tells_it(kind, labelled, monkeypatch):
    flow, (images, condition) = FlowMatchEulerDiscreteScheduler(), labelled
    family = type(kind, (Oracle,), {})(flow, unit=1000.0)
    assert loss_of(family, images, flow, condition) < 1e-6


def test_the_loss_of_noise_is_the_one_that_the_tables_were_made_with(unet, scheduler):
    """To the last bit, with the same random numbers."""
    images, generator = torch.rand(12, 1, 8, 8) * 2 - 1, iteration_generator(3, 5)
    pick = torch.randint(12, (4,), generator=generator)
    t = torch.randint(1000, (4,), generator=generator)
    eps = torch.randn(4, 1, 8, 8, generator=generator)
    x_t = scheduler.add_noise(images[pick], eps, t).contiguous(memory_format=torch.channels_last)
    expected = F.mse_loss(unet(x_t, t).sample, eps)
    assert torch.equal(denoising_loss(unet, images, scheduler, 4, iteration_generator(3, 5)), expected)


def test_half_precision(unet, scheduler):
    images = torch.rand(12, 1, 8, 8) * 2 - 1
    expected = denoising_loss(unet, images, scheduler, 4, iteration_generator(0, 0))
    found = denoising_loss(unet.bfloat16(), images, scheduler, 4, iteration_generator(0, 0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


FLOW = FlowMatchEulerDiscreteScheduler()
TRAINING = dict(batch=4, warmup=2, iterations=2, steps=2, seeds=range(3), progress=False, follow=0.0)


@pytest.fixture
def dit(monkeypatch):
    """A transformer that predicts a variance, too; its generators are hardly fitted."""
    original = finetuning.calibrate
    monkeypatch.setattr(finetuning, "calibrate", lambda *args, **options: original(*args, **options, iterations=3))
    sizes = dict(sample_size=8, in_channels=2, out_channels=4, patch_size=2, num_layers=1, norm_num_groups=2)
    model = DiTTransformer2DModel(**sizes, num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=10)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("scheduler", [FLOW, DDIMScheduler(prediction_type="v_prediction")], ids=["flow", "v"])
def test_a_transformer_with_classes_is_trained_and_comes_back(dit, scheduler, tmp_path):
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    images, labels = torch.rand(6, 2, 8, 8) * 2 - 1, torch.arange(6)
    losses = finetune(dit, scheduler, images, condition={"class_labels": labels}, out=tmp_path, **TRAINING)
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    restore(dit)
    assert all(torch.equal(value, before[name]) for name, value in dit.state_dict().items())
    assert finetune(dit, scheduler, images, condition={"class_labels": labels}, out=tmp_path, **TRAINING) == losses
    restore(dit)
    with pytest.raises(TDQError, match=r"holds one with condition\.class_labels = .*Choose another out"):
        finetune(dit, scheduler, images, condition={"class_labels": labels.flip(0)}, out=tmp_path, **TRAINING)


def test_no_layer_drops_labels_of_its_own(dit, monkeypatch):
    seen, original = [], finetuning.denoising_loss
    monkeypatch.setattr(finetuning, "denoising_loss", lambda *args, **more: seen.append(modes(dit)) or original(*args, **more))
    images, labels = torch.rand(2, 2, 8, 8), torch.tensor([3, 8])
    finetune(dit, FLOW, images, condition={"class_labels": labels}, **TRAINING)
    assert seen == [{"LabelEmbedding": False, "DiTTransformer2DModel": True}] * 2


def modes(model):
    kinds = ("LabelEmbedding", "DiTTransformer2DModel")
    return {type(module).__name__: module.training for module in model.modules() if type(module).__name__ in kinds}


def test_calibration_sees_the_conditions_of_the_first_images(dit, monkeypatch):
    told, original = [], finetuning.calibrate
    monkeypatch.setattr(finetuning, "calibrate", lambda *args, **options: told.append(options) or original(*args, **options))
    images, labels = torch.rand(2, 2, 8, 8), torch.tensor([3, 8])
    finetune(dit, FLOW, images, condition={"class_labels": labels}, **TRAINING)
    assert told[0]["condition"]["class_labels"].tolist() == [3, 8, 3] and told[0]["seeds"] == [0, 1, 2]


def test_the_variance_gets_no_gradient(dit):
    images, labels = torch.rand(6, 2, 8, 8) * 2 - 1, {"class_labels": torch.arange(6)}
    other = copy.deepcopy(dit)
    dit.requires_grad_(True)
    loss = denoising_loss(dit, images, FLOW, 4, iteration_generator(0, 0), condition=labels)
    loss.backward()
    gradient = dit.proj_out_2.bias.grad.view(-1, 4)  # pixels of a patch, channels
    assert (gradient[:, 2:] == 0).all() and (gradient[:, :2] != 0).any()
    other.proj_out_2.bias.view(-1, 4)[:, 2:] += 1
    assert torch.equal(denoising_loss(other, images, FLOW, 4, iteration_generator(0, 0), condition=labels), loss.detach())


@pytest.mark.parametrize(("given", "message"), [
    (dict(condition={"class_labels": torch.arange(5)}), r"condition must have one row for each of the 6 images.*\(5,\)"),
    (dict(scheduler=diffusers.EDMEulerScheduler()), "Training knows .* epsilon, sample, v_prediction; got EDMEulerScheduler"),
    (dict(scheduler=DDIMScheduler(prediction_type="noise")), "got DDIMScheduler with 'noise'. Pass the model's own"),
])  # fmt: skip
def test_nothing_is_begun_towards_an_unknown_target(dit, tmp_path, given, message):
    given = dict(scheduler=FLOW) | given
    with pytest.raises(TDQError, match=message):
        finetune(dit, images=torch.rand(6, 2, 8, 8), out=tmp_path, **given, **TRAINING)
    assert not hasattr(dit, "quantization") and not list(tmp_path.iterdir())
