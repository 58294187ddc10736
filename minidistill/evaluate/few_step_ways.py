"""Ways to teach a LoRA few steps, for `evaluate few-steps` and `evaluate steering`: ours and others'.

All learn from the same trajectories of the guided teacher, in a loop like that of train.py.
"""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.conditioning import Conditioning
from minidistill.data.examples import batch_indices, prompts_of
from minidistill.data.prompts import prompt_split
from minidistill.data.trajectories import generate
from minidistill.distill import ddim_coefficients, learning_rate
from minidistill.evaluate.metrics import EVALUATION_SEED
from minidistill.evaluate.quality import model_stamp
from minidistill.evaluate.sampling import Stopwatch
from minidistill.evaluate.students import Teacher, teacher_of
from minidistill.formats.files import digest
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import LoRAFile, read_lora
from minidistill.formats.lora_io import add_student, check_source, merge_file, save_lora
from minidistill.guidance import guided, plain, student
from minidistill.lora import LoRAModel, inject_lora, lora_parameters
from minidistill.pipeline import StableDiffusion, to_images
from minidistill.samplers import Predictor, ddim_loop, fresh_noise, step_pairs
from minidistill.schedule import Schedule, add_noise, clean_and_noise
from minidistill.training.command_line import (
    DEFAULT_GUIDANCE,
    add_model_flags,
    load_options,
    out_folder,
    positive,
    positive_int,
)
from minidistill.training.cuda_graph import adamw, set_learning_rate
from minidistill.training.students import LoRAStudent

BATCH = 16  # examples in an update


def add_flags(parser: ArgumentParser) -> None:
    """The flags that few-steps and steering share."""
    flag, number = parser.add_argument, dict(type=positive_int, metavar="N")
    flag("--guidance", type=positive, default=DEFAULT_GUIDANCE, metavar="X",
         help="the teacher's guidance scale (default: %(default)s)")  # fmt: skip
    flag("--teacher-steps", **number, default=24, help="DDIM steps of the teacher (default: %(default)s)")
    flag("--trajectories", **number, default=480, help="trajectories to learn from (default: %(default)s)")
    flag("--updates", **number, default=300, help=f"updates of {BATCH} examples (default: %(default)s)")
    flag("--rank", **number, default=16, help="rank of the LoRA (default: %(default)s)")
    flag("--prompts", **number, default=1000, help="held-out prompts (default: at most %(default)s)")
    flag("--each", **number, default=1, help="images of each prompt (default: %(default)s)")
    flag("--judge", metavar="MODULE", help="a module with measures for this model's images")
    flag("--out", type=out_folder, default="runs/few-steps", metavar="FOLDER", help="results (default: %(default)s)")
    add_model_flags(parser, dtypes=("float32",))


def check_teacher(sd: StableDiffusion, student: LoRAFile, guidance: float) -> None:
    """Raise ValueError for a student of another teacher than ours, guided at all t and without a negative prompt.

    Raises CheckpointError for a student of a model that predicts something else: ``merge_file``, used here, does not.
    """
    check_source(student.metadata, sd.schedule.prediction, sd.learned_guidance, sd.path, student=str(student.path))
    learned, ours = teacher_of(student), Teacher(guidance, sd.stated_negative(None))
    if learned._replace(negative_prompt=sd.stated_negative(learned.negative_prompt)) != ours:
        raise ValueError(
            f"{student.path} learned from another teacher ({learned}) than this one ({ours}): name another student, or "
            "another --guidance."
        )


@dataclass
class Lesson:
    """What all ways learn from: N trajectories of the guided teacher, at the S + 1 states that S steps visit.

    z: [N, S + 1, 4, h, w], from z_T to z_0.  cond: their prompts.  uncond: the empty prompt.  k, q: of each step,
    z_s = k z_t + q prediction.
    """

    schedule: Schedule
    z: Tensor
    cond: Conditioning
    uncond: Conditioning
    guidance: float
    updates: int
    k: Tensor = field(init=False)
    q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.k, self.q = (x.to(self.z) for x in ddim_coefficients(self.schedule, self.z.shape[1] - 1))

    def step(self, unet: LoRAModel, z_t: Tensor, cond: Conditioning, i: int | Tensor) -> Tensor:
        """The student's step number ``i``, one for all or [B], from z_t to z_s."""
        times = torch.tensor(self.schedule.timesteps(len(self.k), "trailing"), device=z_t.device)
        return self.k[i] * z_t + self.q[i] * unet(z_t, times[i].expand(len(z_t)), cond, lora_enabled=True)

    def coarser(self, steps: int) -> "Lesson":
        """The same trajectories in fewer steps."""
        return replace(self, z=self.z[:, :: len(self.k) // steps])


def read_lesson(sd: StableDiffusion, captions: list[str], args: Namespace, steps: int) -> Lesson:
    """Have the teacher sample what is missing, as train.py --student-steps does, and read all of it.

    Raises ValueError for W in 8 bits.
    """
    if args.weights:
        raise ValueError(f"LoRAs cannot be merged into --weights {args.weights}, as is done here: leave it out.")
    count = args.trajectories
    stored = generate(
        sd, captions, args.out / f"states-{steps}", count=count, steps=args.teacher_steps, guidance=args.guidance,
        student_steps=steps,
    )  # fmt: skip
    each = torch.arange(count)
    states = [stored.states(each, torch.full_like(each, i))[0] for i in range(steps)]
    prompts, prompt_of = prompts_of(sd, captions, stored)
    z = torch.stack([*states, stored.ends(each)], 1).to(sd.device)  # [count, steps + 1, 4, h, w]
    cond, uncond = prompts[prompt_of].to(sd.device), sd.encode_negative()
    return Lesson(sd.schedule, z, cond, uncond, args.guidance, args.updates)


# A loss takes the student, the lesson, the trajectories of the batch (z and cond) and a generator of random numbers.
Loss = Callable[[LoRAModel, Lesson, Tensor, Conditioning, torch.Generator], Tensor]


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """sqrt((x - y)^2 + c^2) - c, mean ("Improved Techniques for Training Consistency Models", arXiv 2310.14189)."""
    return ((x - y).square() + c**2).sqrt().sub(c).mean()


def one_step(unet, lesson, z, cond, generator, distance=F.mse_loss) -> Tensor:
    """From a stored state to the next stored one: with the squared distance, what train.py does."""
    i = torch.randint(len(lesson.k), (len(z),), generator=generator).to(z.device)
    rows = torch.arange(len(z), device=z.device)
    return distance(lesson.step(unet, z[rows, i], cond, i), z[rows, i + 1])


def own_states(unet, lesson, z, cond, generator) -> Tensor:
    """From a state that the student itself reaches to the stored state after it."""
    i = torch.randint(len(lesson.k), (), generator=generator).item()
    z_t = z[:, 0]
    with torch.no_grad():
        for j in range(i):
            z_t = lesson.step(unet, z_t, cond, j)
    return F.mse_loss(lesson.step(unet, z_t, cond, i), z[:, i + 1])


def through_all_steps(unet, lesson, z, cond, generator) -> Tensor:
    """From z_T to z_0 by the student alone, with the gradient through all of its calls."""
    z_t, loss = z[:, 0], 0.0
    for i in range(len(lesson.k)):
        z_t = lesson.step(unet, z_t, cond, i)
        loss = loss + F.mse_loss(z_t, z[:, i + 1])
    return loss


def any_number_of_steps(unet, lesson, z, cond, generator) -> Tensor:
    """One of 1, 2, 4 or 8 steps, from a stored state to the stored state where it ends."""
    steps = 2 ** torch.randint(4, (), generator=generator).item()
    coarser = replace(lesson, z=z).coarser(steps)
    return one_step(unet, coarser, coarser.z, cond, generator)


def fit(unet: LoRAModel, lesson: Lesson, loss: Loss) -> None:
    """The loop of train.py: AdamW, warm-up and cosine, gradients clipped at norm 1."""
    trained = lora_parameters(unet)
    peak = LoRAStudent.learning_rate / unet.base.config.widths[0]
    optimizer = adamw(trained, peak)
    for update in tqdm(range(lesson.updates), unit="step", leave=False):
        rows = batch_indices(len(lesson.z), BATCH, 0, update)
        set_learning_rate(optimizer, learning_rate(update, lesson.updates, peak, warmup=max(lesson.updates // 10, 1)))
        loss(unet, lesson, lesson.z[rows], lesson.cond[rows], torch.Generator().manual_seed(update)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def learn_consistency(unet: LoRAModel, lesson: Lesson, skip: int = 20, decay: float = 0.95) -> None:
    """Latent consistency distillation ("LCM-LoRA", arXiv 2311.05556), with the guided teacher in the loop.

    The student's z_0 at t is pulled towards its moving average's z_0 at t - 20, one DDIM step of the teacher later.
    """
    average, schedule = deepcopy(unet), lesson.schedule

    def loss(unet: LoRAModel, lesson: Lesson, z: Tensor, cond: Conditioning, generator: torch.Generator) -> Tensor:
        n = torch.randint(1, schedule.train_steps // skip + 1, (), generator=generator).item()
        t, t_next = n * skip - 1, (n - 1) * skip - 1
        z_t = renoise(schedule, z[:, -1], t, generator)
        teacher = guided(unet, cond, lesson.uncond.expand(len(z)), lesson.guidance)
        ((target, _, _),) = ddim_loop(teacher, schedule, z_t, [(t, t_next)])
        with torch.no_grad():
            torch._foreach_lerp_(lora_parameters(average), lora_parameters(unet), 1 - decay)
            target = predict_z_0(student(average, cond), schedule, target, t_next) if t_next >= 0 else target
        return pseudo_huber(predict_z_0(student(unet, cond), schedule, z_t, t), target, c=0.001)

    fit(unet, lesson, loss)


def learn_progressively(unet: LoRAModel, lesson: Lesson) -> None:
    """Halve the steps again and again ("Progressive Distillation", arXiv 2202.00512).

    The first student learns from the guided teacher, each later one from the student before it.
    """
    stages = [len(lesson.k)]
    while 2 * stages[0] <= 16:
        stages.insert(0, 2 * stages[0])
    stage, before = replace(lesson, updates=max(1, lesson.updates // len(stages))), None
    for steps in stages:
        fit(unet, stage, partial(two_steps_in_one, steps, before))
        before = deepcopy(unet)


def two_steps_in_one(steps: int, before: LoRAModel | None, unet, lesson, z, cond, generator) -> Tensor:
    """One of ``steps`` by the student, from the noised z_0, to where two steps of its teacher lead."""
    schedule, i = lesson.schedule, torch.randint(steps, (), generator=generator).item()
    t, middle, t_next = [*schedule.timesteps(2 * steps, "trailing"), -1][2 * i : 2 * i + 3]
    z_t = renoise(schedule, z[:, -1], t, generator)
    teacher = student(before, cond) if before else guided(unet, cond, lesson.uncond.expand(len(z)), lesson.guidance)
    *_, (target, _, _) = ddim_loop(teacher, schedule, z_t, [(t, middle), (middle, t_next)])
    k, q = (x[i].to(z_t) for x in ddim_coefficients(schedule, steps))
    return F.mse_loss(k * z_t + q * predict(student(unet, cond), z_t, t), target)


def predict(model: Predictor, z_t: Tensor, t: int) -> Tensor:
    return model(z_t, torch.full((len(z_t),), t, device=z_t.device))


def predict_z_0(model: Predictor, schedule: Schedule, z_t: Tensor, t: int) -> Tensor:
    """The z_0 that the model's prediction at t implies."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor([t]), z_t)
    return clean_and_noise(schedule.prediction, predict(model, z_t, t), z_t, alpha, sigma)[0]


def renoise(schedule: Schedule, z_0: Tensor, t: int, generator: torch.Generator) -> Tensor:
    return add_noise(schedule, z_0, fresh_noise(z_0, generator), torch.tensor([t]))


class Way(NamedTuple):
    """How to learn, and how that differs from train.py."""

    learn: Callable[[LoRAModel, Lesson], None]
    updates: int = 1  # a factor
    begun: bool = False  # from the one-pass student
    on_top: bool = False  # of the one-pass student, merged into W
    renoise: bool = False  # sample as consistency models do
    steps: int | None = None  # that it learns, if not the number that is measured

    @property
    def needs_one_pass(self) -> bool:
        return self.begun or self.on_top


squared_error = partial(fit, loss=one_step)
WAYS = {
    "train.py": Way(squared_error),
    "begun from the one-pass student": Way(squared_error, begun=True),
    "on top of the one-pass student": Way(squared_error, on_top=True),
    "twice the updates": Way(squared_error, updates=2),
    "L1": Way(partial(fit, loss=partial(one_step, distance=F.l1_loss))),
    "own states": Way(partial(fit, loss=own_states)),
    "through all steps": Way(partial(fit, loss=through_all_steps)),
    "one LoRA for 1, 2, 4 and 8 steps": Way(partial(fit, loss=any_number_of_steps), steps=8),
    "consistency distillation": Way(learn_consistency, renoise=True),
    "progressive distillation": Way(learn_progressively),
}


def train_way(name: str, steps: int, lesson: Lesson, one_pass: LoRAFile | None, args: Namespace) -> LoRAFile:
    """The LoRA of a way that takes ``steps``, kept in --out and trained unless it is there.

    Raises ValueError if one is there that was trained with other settings.
    """
    way, file = WAYS[name], args.out / f"{steps}-{re.sub('[^a-z0-9]+', '-', name.lower())}.safetensors"
    sd = load(args.model, **load_options(args))
    start_of = way.needs_one_pass and digest(one_pass.path.read_bytes())
    made_with = (
        f"{args.updates} updates, rank {args.rank}, {args.trajectories} trajectories of {args.teacher_steps} steps, "
        f"guidance {args.guidance:g}, {model_stamp(sd, args, prompt_split(args.model)[0])}, {start_of}"
    )
    if not file.exists():
        clock = Stopwatch(sd.device)
        with clock:
            if way.on_top:  # the guidance stays in W as it is; a second LoRA learns the steps
                merge_file(sd.unet, one_pass)
            torch.manual_seed(0)
            if way.begun:
                add_student(sd, one_pass)
            else:
                sd.unet = inject_lora(sd.unet, args.rank)
            way.learn(sd.unet, replace(lesson.coarser(steps), updates=way.updates * lesson.updates))
        save_lora(sd.unet, file, {"seconds": f"{clock.seconds:.0f}", "made_with": made_with})
    lora = read_lora(file)
    if (other := lora.metadata["made_with"]) != made_with:
        raise ValueError(f"{file} was trained with other settings ({other}): name another --out.")
    return lora


def load_merged(loras: Iterable[LoRAFile], args: Namespace) -> StableDiffusion:
    """The model with all of these merged into W."""
    sd = load(args.model, **load_options(args))
    for lora in loras:
        merge_file(sd.unet, lora)
    return sd


@torch.no_grad()
def sample_renoised(sd: StableDiffusion, prompts: Sequence[str], steps: int, batch: int = 32) -> list[Image.Image]:
    """Each step predicts z_0 and noises it afresh ("Consistency Models", arXiv 2303.01469, algorithm 1)."""
    images = []
    for first in range(0, len(prompts), batch):
        cond = sd.encode_prompt(list(prompts[first : first + batch]))
        z_t = sd.starting_noise(range(EVALUATION_SEED + first, EVALUATION_SEED + first + len(cond)))
        generator = torch.Generator().manual_seed(first)
        for t, t_next in step_pairs(sd.schedule, steps, "trailing"):
            z_t = predict_z_0(plain(sd.unet, cond), sd.schedule, z_t, t)
            z_t = renoise(sd.schedule, z_t, t_next, generator) if t_next >= 0 else z_t
        images += [image for one in z_t.split(1) for image in to_images(sd.decode(one))]
    return images
