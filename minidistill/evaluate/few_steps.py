"""Compare ways to teach a LoRA few steps: what helps, what does not, and what others do.

  python -m minidistill.evaluate few-steps --student-steps 2 --one-pass weights/pocket-emoji/guidance-lora.safetensors

Every way has the teacher's trajectories, the same updates unless its name says more, and one seed. Measured on held-out
prompts against the teacher in all its steps: PSNR, CLIP score, sharpness (mean squared Laplacian of the image, the
teacher's is 1), and what --judge measures. Finished ways are not repeated.
"""

import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minidistill.conditioning import Conditioning
from minidistill.data.examples import batch_indices, prompts_of
from minidistill.data.prompts import prompt_split, spread
from minidistill.data.trajectories import generate
from minidistill.distill import ddim_coefficients, learning_rate
from minidistill.evaluate.image_grid import comparison_grid
from minidistill.evaluate.metrics import EVALUATION_SEED, ClipScore, Estimate, interval, pixels, psnr
from minidistill.evaluate.quality import FORMATS, cached, model_stamp, read_judge
from minidistill.evaluate.sampling import Drawn
from minidistill.evaluate.tables import markdown_table
from minidistill.formats.files import atomic_write, write_json
from minidistill.formats.load_model import load
from minidistill.formats.lora_formats import LoRAFile, read_lora
from minidistill.formats.lora_io import add_student, save_lora
from minidistill.guidance import guided, student
from minidistill.lora import LoRAModel, inject_lora, lora_parameters
from minidistill.pipeline import StableDiffusion, pil_images, to_images
from minidistill.samplers import Predictor, ddim_loop
from minidistill.schedule import Schedule, add_noise, clean_and_noise
from minidistill.training.command_line import DEFAULT_GUIDANCE, add_model_flags, load_options, positive, positive_int
from minidistill.training.cuda_graph import adamw, set_learning_rate
from minidistill.training.students import LoRAStudent

POSITIONAL = ""


def add_flags(parser: ArgumentParser) -> None:
    flag, number = parser.add_argument, dict(type=positive_int, metavar="N")
    flag("--student-steps", **number, nargs="+", default=[2], help="how many steps to learn: divisors of "
         "--teacher-steps and of the largest, at least 8 with one LoRA for all (default: 2)")  # fmt: skip
    flag("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
         help=f"any of {', '.join(map(repr, WAYS))} (default: all)")  # fmt: skip
    flag("--one-pass", type=Path, metavar="RUN_OR_LORA", help="a student that takes as many steps as its teacher")
    flag("--loras", type=Path, nargs="+", default=[], metavar="RUN_OR_LORA", help="students of train.py "
         "--student-steps to measure as well")  # fmt: skip
    flag(
        "--guidance", type=positive, default=DEFAULT_GUIDANCE, metavar="X", help="the teacher's (default: %(default)s)"
    )
    flag("--teacher-steps", **number, default=24, help="DDIM steps (default: %(default)s)")
    flag("--trajectories", **number, default=480, help="to learn from (default: %(default)s)")
    flag("--updates", **number, default=400, help="of 16 examples (default: %(default)s)")
    flag("--rank", **number, default=16, help="of the LoRA (default: %(default)s)")
    flag("--prompts", **number, default=1000, help="held-out prompts (default: at most %(default)s)")
    flag("--each", **number, default=1, help="images of each prompt (default: %(default)s)")
    flag("--judge", metavar="MODULE", help="a module with measures for this model's images")
    flag("--out", type=Path, default=Path("runs/few-steps"), metavar="FOLDER", help="results (default: %(default)s)")
    add_model_flags(parser, dtypes=("float32",))


@dataclass
class Lesson:
    """What all ways learn from: N trajectories of the guided teacher, at the S + 1 states that S steps visit.

    z: [N, S + 1, 4, h, w], from z_T to z_0.  cond: their prompts.  uncond: the empty prompt.  updates, batch, rank: of
    the training.  k, q: of each step, z_s = k z_t + q prediction.
    """

    schedule: Schedule
    z: Tensor
    cond: Conditioning
    uncond: Conditioning
    guidance: float
    updates: int
    rank: int
    batch: int = 16
    start: LoRAFile | None = None  # begin from it instead of a new LoRA
    k: Tensor = field(init=False)
    q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.k, self.q = (x.to(self.z) for x in ddim_coefficients(self.schedule, self.z.shape[1] - 1))

    @property
    def times(self) -> list[int]:
        return self.schedule.timesteps(len(self.k), "trailing")

    def step(self, unet: LoRAModel, z_t: Tensor, cond: Conditioning, i: int | Tensor) -> Tensor:
        """The student's step number ``i``, one for all or [B], from z_t to z_s."""
        t = torch.tensor(self.times, device=z_t.device)[i].expand(len(z_t))
        return self.k[i] * z_t + self.q[i] * unet(z_t, t, cond, lora_enabled=True)

    def coarser(self, steps: int) -> "Lesson":
        """The same trajectories in fewer steps."""
        return replace(self, z=self.z[:, :: len(self.k) // steps])


# A loss takes the student, the lesson, the trajectories of the batch (z and cond) and a generator of random numbers.
Loss = Callable[[LoRAModel, Lesson, Tensor, Conditioning, torch.Generator], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


def pseudo_huber(x: Tensor, y: Tensor, c: float = 0.03) -> Tensor:
    """sqrt((x - y)^2 + c^2) - c, mean ("Improved Techniques for Training Consistency Models", arXiv 2310.14189)."""
    return ((x - y).square() + c**2).sqrt().sub(c).mean()


def one_step(distance: Distance, unet, lesson, z, cond, generator) -> Tensor:
    """From a stored state to the next stored one: with the squared distance, what train.py does."""
    i = torch.randint(len(lesson.k), (len(z),), generator=generator).to(z.device)
    rows = torch.arange(len(z), device=z.device)
    return distance(lesson.step(unet, z[rows, i], cond, i), z[rows, i + 1])


def own_states(unet, lesson, z, cond, generator) -> Tensor:
    """From where the student itself gets to, to the stored state of the next time."""
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


def fit(unet: LoRAModel, lesson: Lesson, loss: Loss, after: Callable[[], None] = lambda: None) -> None:
    """The loop of train.py: AdamW, warm-up and cosine, gradients clipped at norm 1."""
    trained = lora_parameters(unet)
    peak = LoRAStudent.learning_rate / unet.base.config.widths[0]
    optimizer = adamw(trained, peak)
    for update in tqdm(range(lesson.updates), unit="step", leave=False):
        rows = batch_indices(len(lesson.z), lesson.batch, 0, update)
        set_learning_rate(optimizer, learning_rate(update, lesson.updates, peak, warmup=max(lesson.updates // 10, 1)))
        loss(unet, lesson, lesson.z[rows], lesson.cond[rows], torch.Generator().manual_seed(update)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after()


def learn(loss: Loss, sd: StableDiffusion, lesson: Lesson) -> None:
    """Give ``sd.unet`` a LoRA and train it."""
    add_lora(sd, lesson)
    fit(sd.unet, lesson, loss)


def add_lora(sd: StableDiffusion, lesson: Lesson) -> None:
    torch.manual_seed(0)
    if lesson.start:
        add_student(sd, lesson.start)
    else:
        sd.unet = inject_lora(sd.unet, lesson.rank)


def learn_through_decoder(sd: StableDiffusion, lesson: Lesson) -> None:
    """The squared distance of latents, and a tenth of that of their images."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(x, y) + 0.1 * F.mse_loss(sd.vae.decode(x), sd.vae.decode(y))

    learn(partial(one_step, distance), sd, lesson)


def learn_consistency(sd: StableDiffusion, lesson: Lesson, skip: int = 20, decay: float = 0.95) -> None:
    """Latent consistency distillation ("LCM-LoRA", arXiv 2311.05556), with the guided teacher in the loop.

    The z_0 of the student at t is drawn to that of its moving average at t - 20, where one DDIM step of the teacher
    leads.
    """
    add_lora(sd, lesson)
    average, schedule = deepcopy(sd.unet), lesson.schedule

    def loss(unet: LoRAModel, lesson: Lesson, z: Tensor, cond: Conditioning, generator: torch.Generator) -> Tensor:
        n = torch.randint(1, schedule.train_steps // skip + 1, (), generator=generator).item()
        t, t_next = n * skip - 1, (n - 1) * skip - 1
        z_t = noised(schedule, z[:, -1], t, generator)
        teacher = guided(unet, cond, lesson.uncond.expand(len(z)), lesson.guidance)
        ((target, _, _),) = ddim_loop(teacher, schedule, z_t, [(t, t_next)])
        with torch.no_grad():
            target = clean(student(average, cond), schedule, target, t_next) if t_next >= 0 else target
        return pseudo_huber(clean(student(unet, cond), schedule, z_t, t), target, c=0.001)

    @torch.no_grad()
    def follow() -> None:
        torch._foreach_lerp_(lora_parameters(average), lora_parameters(sd.unet), 1 - decay)

    fit(sd.unet, lesson, loss, follow)


def learn_progressively(sd: StableDiffusion, lesson: Lesson) -> None:
    """Halve the steps again and again ("Progressive Distillation", arXiv 2202.00512).

    The first student learns from the guided teacher, each later one from the student before it.
    """
    add_lora(sd, lesson)
    before = None
    stages = [steps for steps in (16, 8, 4, 2, 1) if steps >= len(lesson.k)]
    for steps in stages:
        stage = replace(lesson, updates=lesson.updates // len(stages))
        fit(sd.unet, stage, partial(two_steps_in_one, steps, before))
        before = deepcopy(sd.unet)


def two_steps_in_one(steps: int, before: LoRAModel | None, unet, lesson, z, cond, generator) -> Tensor:
    """One of ``steps`` by the student, from the noised z_0, to where two steps of its teacher lead."""
    schedule, i = lesson.schedule, torch.randint(steps, (), generator=generator).item()
    t, middle, t_next = [*schedule.timesteps(2 * steps, "trailing"), -1][2 * i : 2 * i + 3]
    z_t = noised(schedule, z[:, -1], t, generator)
    teacher = guided(unet, cond, lesson.uncond.expand(len(z)), lesson.guidance)
    teacher = student(before, cond) if before else teacher
    *_, (target, _, _) = ddim_loop(teacher, schedule, z_t, [(t, middle), (middle, t_next)])
    k, q = (x[i].to(z_t) for x in ddim_coefficients(schedule, steps))
    return F.mse_loss(k * z_t + q * at(student(unet, cond), z_t, t), target)


def at(model: Predictor, z_t: Tensor, t: int) -> Tensor:
    return model(z_t, torch.full((len(z_t),), t, device=z_t.device))


def clean(model: Predictor, schedule: Schedule, z_t: Tensor, t: int) -> Tensor:
    """The z_0 that the model's prediction at t implies."""
    alpha, sigma = schedule.alpha_sigma(torch.full((len(z_t),), t), z_t)
    return clean_and_noise(schedule.prediction, at(model, z_t, t), z_t, alpha, sigma)[0]


def noised(schedule: Schedule, z_0: Tensor, t: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(z_0.shape, generator=generator).to(z_0)
    return add_noise(schedule, z_0, noise, torch.full((len(z_0),), t))


def any_number_of_steps(unet, lesson, z, cond, generator) -> Tensor:
    """One step of 1, 2, 4 or 8, from a stored state to the stored one where that step ends."""
    steps = 2 ** torch.randint(4, (), generator=generator).item()
    coarser = replace(lesson, z=z).coarser(steps)
    return one_step(F.mse_loss, unet, coarser, coarser.z, cond, generator)


class Way(NamedTuple):
    """How to learn, and what differs from the settings: factors of updates, rank and trajectories, and the start."""

    learn: Callable[[StableDiffusion, Lesson], None]
    updates: int = 1
    rank: int = 1
    trajectories: float = 1
    begun: bool = False  # from the one-pass student
    renoise: bool = False  # sample as consistency models do
    steps: int | None = None  # that it learns, if not the number that is measured

    def __call__(self, sd: StableDiffusion, lesson: Lesson, one_pass: LoRAFile | None) -> None:
        count = round(self.trajectories * len(lesson.z))
        changes = dict(z=lesson.z[:count], cond=lesson.cond[:count], start=one_pass if self.begun else None)
        changes |= dict(updates=self.updates * lesson.updates, rank=self.rank * lesson.rank)
        self.learn(sd, replace(lesson, **changes))


squared = partial(learn, partial(one_step, F.mse_loss))
WAYS = {
    "train.py": Way(squared),
    "begun from the one-pass student": Way(squared, begun=True),
    "twice the updates": Way(squared, updates=2),
    "half the trajectories": Way(squared, trajectories=0.5),
    "four times the rank": Way(squared, rank=4),
    "L1": Way(partial(learn, partial(one_step, F.l1_loss))),
    "pseudo-Huber": Way(partial(learn, partial(one_step, pseudo_huber))),
    "distance of the decoded images": Way(learn_through_decoder),
    "own states": Way(partial(learn, own_states)),
    "through all steps": Way(partial(learn, through_all_steps)),
    "one LoRA for 1, 2, 4 and 8 steps": Way(partial(learn, any_number_of_steps), steps=8),
    "consistency distillation": Way(learn_consistency, renoise=True),
    "progressive distillation": Way(learn_progressively),
}


def run(args: Namespace) -> None:
    if args.one_pass is None and any(WAYS[name].begun for name in args.ways):
        raise ValueError("--ways: some begin from a student that takes as many steps as its teacher: give --one-pass.")
    one_pass, finished = args.one_pass and read_lora(args.one_pass), [read_lora(path) for path in args.loras]
    for lora in finished:
        if not lora.few_steps or lora.few_steps[0] not in args.student_steps or lora.guidance != args.guidance:
            numbers = " or ".join(map(str, args.student_steps))
            raise ValueError(f"--loras {lora.path} has not learned {numbers} steps at guidance {args.guidance:g}.")
    steps = {*args.student_steps, *(WAYS[name].steps for name in args.ways)} - {None}
    if odd := [n for n in steps if max(steps) % n or args.teacher_steps % n]:
        raise ValueError(f"{odd[0]} steps must divide both {max(steps)}, the most to learn, and --teacher-steps.")
    load_again = partial(load, args.model, **load_options(args))
    sd, (captions, held_out) = load_again(), prompt_split(args.model)
    prompts = [prompt for prompt in spread(held_out, args.prompts) for _ in range(args.each)]
    lesson = read_lesson(sd, captions, args, max(steps))
    model = model_stamp(sd, args)
    settings = (
        f"{args.updates} updates, rank {args.rank}, {args.trajectories} trajectories of {args.teacher_steps} steps, "
        f"guidance {args.guidance:g}, {sd.schedule.prediction}, {sd.width}x{sd.height}, {model['networks']}"
    )
    clip, judge = ClipScore.in_model(sd), read_judge(args.judge)
    options = dict(spacing="trailing", seed=EVALUATION_SEED, batch=32, progress=True)

    def teacher_images() -> dict[str, Tensor]:
        drawn = sd.sample(prompts, steps=args.teacher_steps, guidance=args.guidance, **options)
        return {"images": pixels(drawn)}

    stamp = model | dict(prompts=prompts, steps=args.teacher_steps, guidance=args.guidance)
    teacher = pil_images(cached(args.out / "teacher.safetensors", stamp, teacher_images)["images"])
    teachers_sharpness = sharpness(teacher).mean()

    def learned(name: str, steps: int) -> LoRAFile:
        """The LoRA of a way, trained unless there is one."""
        file = args.out / f"{steps}-{re.sub('[^a-z0-9]+', '-', name.lower())}.safetensors"
        made_with = f"{settings}, {WAYS[name].begun and one_pass.path}"
        if not file.exists():
            sd, start = load_again(), time.perf_counter()
            WAYS[name](sd, lesson.coarser(steps), one_pass)
            seconds = f"{time.perf_counter() - start:.0f}"
            save_lora(sd.unet, file, {"seconds": seconds, "made_with": made_with})
        lora = read_lora(file)
        if (other := lora.metadata["made_with"]) != made_with:
            raise ValueError(f"{file} was trained with other settings ({other}): name another --out.")
        return lora

    def compare(N: int) -> None:
        rows, drawn = [], []

        def add(name: str, images: list[Image.Image], calls: int, seconds: float = 0.0) -> None:
            by_image = {"PSNR": psnr(images, teacher)} if images is not teacher else {}
            by_image |= {"sharpness": sharpness(images) / teachers_sharpness}
            by_image |= {"CLIP score": clip(images, prompts)} if clip else {}
            by_image |= judge.measures(pixels(images), prompts) if judge else {}
            measures = {measure: interval(x.view(-1, args.each))._asdict() for measure, x in by_image.items()}
            rows.append({"way": name, "calls": calls, "seconds of learning": seconds, "measures": measures})
            drawn.append(Drawn(name, images[:: args.each], calls, 0.0))
            write_json(args.out / f"few-steps-{N}.json", args.provenance | {"prompts": len(prompts), "rows": rows})
            print(table(rows).splitlines()[-1], flush=True)

        def measure_student(name: str, lora: LoRAFile, renoise: bool = False) -> None:
            sd = load_again()
            add_student(sd, lora)
            if renoise:
                images = sample_renoised(sd, prompts, N)
            else:
                images = sd.sample(prompts, steps=N, lora_enabled=True, **options)
            add(name, images, N, float(lora.metadata.get("seconds", 0)))

        add(f"teacher, {args.teacher_steps} steps", teacher, 2 * args.teacher_steps)
        add("teacher", sd.sample(prompts, steps=N, guidance=args.guidance, **options), 2 * N)
        if one_pass:
            measure_student("one-pass student", one_pass)
        for lora in finished:
            if lora.few_steps[0] == N:
                measure_student(lora.path.stem, lora)
        for name in args.ways:
            measure_student(name, learned(name, WAYS[name].steps or N), WAYS[name].renoise)
        with atomic_write(args.out / f"few-steps-{N}.png") as temporary:
            comparison_grid(drawn, prompts[:: args.each], columns=8, side=96).save(temporary, "png")
        print(f"\n{table(rows)}\n")

    for N in args.student_steps:
        compare(N)
    print(f"Images and JSON: {args.out}")


def read_lesson(sd: StableDiffusion, captions: list[str], args: Namespace, steps: int) -> Lesson:
    """Have the teacher sample what is missing, as train.py --student-steps does, and read all of it."""
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
    return Lesson(sd.schedule, z, cond, uncond, args.guidance, args.updates, args.rank)


@torch.no_grad()
def sample_renoised(sd: StableDiffusion, prompts: Sequence[str], steps: int, batch: int = 32) -> list[Image.Image]:
    """Each step predicts z_0 and noises it afresh ("Consistency Models", arXiv 2303.01469, algorithm 1)."""
    images = []
    for first in range(0, len(prompts), batch):
        cond = sd.encode_prompt(list(prompts[first : first + batch]))
        z_t = sd.starting_noise(range(EVALUATION_SEED + first, EVALUATION_SEED + first + len(cond)))
        generator = torch.Generator().manual_seed(first)
        for t, t_next in pairwise([*sd.schedule.timesteps(steps, "trailing"), -1]):
            z_t = clean(student(sd.unet, cond), sd.schedule, z_t, t)
            z_t = noised(sd.schedule, z_t, t_next, generator) if t_next >= 0 else z_t
        images += [image for one in z_t.split(1) for image in to_images(sd.decode(one))]
    return images


def sharpness(images: Sequence[Image.Image]) -> Tensor:
    """The mean squared Laplacian of each image, [N]."""
    x = pixels(images).double().mean(1, keepdim=True)  # grey, [N, 1, H, W]
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=x.dtype)
    return F.conv2d(x, laplacian[None, None]).square().mean((1, 2, 3))


def table(rows: Sequence[dict]) -> str:
    """A line for each way, with 95% intervals."""
    names = list(dict.fromkeys(name for row in rows for name in row["measures"]))
    lines = [["", "UNet calls", *names, "seconds of learning"], ["---", *["---:"] * (len(names) + 2)]]
    for row in rows:
        measures = {name: Estimate(**value) for name, value in row["measures"].items()}
        cells = [format(measures[name], FORMATS.get(name, ".1%")) if name in measures else "" for name in names]
        seconds = f"{row['seconds of learning']:.0f}" if row["seconds of learning"] else ""
        lines.append([row["way"], str(row["calls"]), *cells, seconds])
    return markdown_table(lines)
