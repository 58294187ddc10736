"""Distil a guided teacher, two UNet calls a step, into a LoRA student that needs one.

  python train.py                                                 the model that ships here, in minutes on a laptop
  python train.py --model FOLDER --guidance 7.5 --dtype bfloat16  your own Stable Diffusion 1.x or 2.x, on a GPU

Teacher and student are one network: the student is what it becomes with the LoRA switched on.
"""

import math
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minidistill import inject_lora, load, save_lora
from minidistill.data import trajectories as data
from minidistill.data.trajectories import images
from minidistill.distill import ENOUGH, FullStudent, far_off, learning_rate, student, teacher
from minidistill.evaluate import comparison_grid, draw
from minidistill.evaluate.report import write_report
from minidistill.formats.files import digest, written_whole
from minidistill.formats.lora_files import merge_file
from minidistill.formats.lora_formats import read_lora
from minidistill.formats.merged_checkpoint import replaced_by, write_checkpoint
from minidistill.lora import DEFAULT_TARGETS
from minidistill.pipeline import at_work
from minidistill.schedule import add_noise, min_snr_weight
from minidistill.training.ranks import Ranks, process_group
from minidistill.training.recompute import LOW_MEMORY
from minidistill.training.run_folder import checkpoint_files, lock, resume, save_checkpoint, stop_signals
from minidistill.training.settings import (
    ModelSettings,
    ScaledFile,
    count,
    one_sentence,
    parse,
    positive,
    seed_number,
    setting,
)

EVALUATED = 24  # held-out prompts in the report
SHOWN = 8  # and in the pictures drawn on the way
MIN_SNR = 5.0  # of --weighting min-snr, as in its paper
WINDOW = 10  # updates whose losses are read together


@dataclass
class Settings(ModelSettings):
    dtype: str = setting("float32", "dtype of the frozen weights", "model", choices=("float32", "bfloat16", "float64"))
    prompts: Path = setting(
        None, "text file, one prompt a line (default: the model's own, or ours)", "teacher", type=Path
    )
    images: Path = setting(
        None,
        "folder of pictures with captions, in metadata.jsonl or in a .txt beside each: "
        "learn from these, noised, in place of pictures that the teacher draws",
        "teacher",
        type=Path,
    )
    guidance: float = setting(
        2.5, "guidance scale, which the student learns; 7.5 is usual for the large models", "teacher", type=positive
    )
    negative_prompt: str = setting("", "what guidance leads away from, which the student learns too", "teacher")
    teacher_lora: ScaledFile = setting(
        None,
        "a style, a LoRA file that is no student, that the teacher draws in: merged into W",
        "teacher",
        type=ScaledFile.parse,
        metavar="FILE[:SCALE]",
    )
    sample_steps: int = setting(25, "DDIM steps from noise to picture", "teacher", type=count)
    stride: int = setting(3, "of these steps, take only every N-th: more pictures in the time", "teacher", type=count)
    trajectories: int = setting(
        480, "how many pictures the teacher draws; the student learns from the states on the way", "teacher", type=count
    )
    method: str = setting(
        None,
        "a LoRA learns from the teacher's trajectories, or from its pictures noised afresh, teacher in the loop; "
        "or a full copy of the UNet learns from the trajectories (default: trajectories; of --images noised)",
        "student",
        type=str,
        choices=("trajectories", "noised", "full"),
    )
    rank: int = setting(16, "rank of the LoRA", "student", type=count)
    targets: list[str] = setting(
        None,
        "which layers get a LoRA, by patterns of their names; attention's alone: '*.attn?.to_*' "
        "(default: every linear layer and convolution of attention and residual blocks)",
        "student",
        type=str,
        nargs="+",
    )
    alpha: float = setting(None, "the LoRA is scaled by alpha / rank (default: the rank)", "student", type=positive)
    steps: int = setting(300, "updates of the LoRA", "student", type=count)
    batch: int = setting(16, "examples an update, in all processes; pictures drawn at once", "student", type=count)
    lr: float = setting(
        None,
        "peak learning rate (default: 0.128 / the UNet's first width; of a full copy 0.02 / that)",
        "student",
        type=positive,
    )
    weighting: str = setting(
        "even",
        "what the squared error counts at each time step: the same, or as the picture's does by min-SNR-5",
        "student",
        choices=("even", "min-snr"),
    )
    accumulate: int = setting(1, "an update's batch in N parts: less memory, the same update", "student", type=count)
    memory: str = setting(
        "normal",
        "low: recompute in the backward pass what costs little, in place of keeping it",
        "student",
        choices=("low", "normal"),
    )
    batched_teacher: bool = setting(
        False, "in the loop, the teacher guides in one call on a batch of twice the size, which takes memory", "student"
    )
    compile: bool = setting(False, "compile the UNet for the loop: minutes at first, then faster", "student")
    kernel: str = setting(
        "auto",
        "what computes the LoRA's layers: one kernel for W and the pair (on a GPU, in bfloat16), or PyTorch",
        "student",
        choices=("auto", "fused", "torch"),
    )
    out: Path = setting(None, "folder of this run (default: runs/<name of the model>)", "run", type=Path)
    seed: int = setting(0, "seed of everything random", "run", type=seed_number)
    states: Path = setting(
        None,
        "folder of the trajectories or encoded pictures, which several runs may share (default: in --out)",
        "run",
        type=Path,
    )
    save_every: int = setting(100, "updates from a checkpoint and its pictures to the next", "run", type=count)
    resume: bool = setting(False, "go on from the last checkpoint in --out, if there is one", "run")
    no_report: bool = setting(False, "only the LoRA: no evaluation, no pictures", "run")


def in_parts(number: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A batch in so many parts, or in fewer where it is smaller: for each, its slice of every tensor."""
    return zip(*(x.chunk(number) for x in tensors))


def main(args: Settings, ranks: Ranks, held: ExitStack) -> None:
    name = args.model.resolve().name
    out = args.out or Path("runs") / name
    results = [out / "lora.safetensors", out / "student", out / "student.safetensors"]
    if any(path.exists() for path in [*checkpoint_files(out), *results]) and not args.resume:
        raise ValueError(f"{out} holds a run already: add --resume to go on with it, or name another --out.")
    if args.guidance == 1:
        raise ValueError("--guidance 1 is no guidance, which takes one pass as it is: there is nothing to distil.")
    ranks.share(args.batch)  # one that the processes cannot share is refused before any work, too
    args.method = args.method or ("noised" if args.images else "trajectories")
    if args.images and (args.method != "noised" or args.prompts):
        raise ValueError("--images are noised and have captions: leave out --prompts, and any --method but noised.")

    # One network: the teacher, and beside some of its layers the low-rank pairs that make it the student.
    sd = load(args.model, **args.load_options())
    style = ""
    if args.teacher_lora:  # into W itself, which is the student's too
        file, scale = args.teacher_lora
        lora = read_lora(file, scale)
        if lora.is_student:
            raise ValueError(
                f"--teacher-lora {file} has learned guidance, which the student would learn once more: name a style."
            )
        merge_file(sd.unet, lora)
        style = f"{file.name}:{scale:g}"
    if args.images:
        pictures, left_out = images.read_folder(args.images)
        captions, held_out = data.every_tenth_held_out(picture.caption for picture in pictures)
    else:
        captions, held_out = data.prompt_split(args.model, args.prompts)
    shown = data.spread(held_out, SHOWN)
    torch.manual_seed(args.seed)
    if full := args.method == "full":  # plain distillation: two networks, for comparison
        unet = FullStudent(sd.unet, deepcopy(sd.unet).float().requires_grad_())
        learning = unet.student
    else:
        unet = inject_lora(sd.unet, args.rank, args.alpha, args.targets or DEFAULT_TARGETS, args.kernel)
        learning = unet.base
    learning.recompute_below = LOW_MEMORY if args.memory == "low" else 0
    sd.unet = unet
    trainable = [p for p in unet.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in unet.parameters() if not p.requires_grad)
    for network in (sd.text_encoder, sd.vae):
        network.to("cpu")  # to rest, for they work now and then only
    sd.schedule.timesteps(args.sample_steps)  # a number of steps that DDIM cannot take is refused before any work
    uncond = sd.encode_prompt([args.negative_prompt])  # [1, L, D]
    if ranks.first:
        held.enter_context(lock(out))
    ranks.wait()
    print(f"{name}: {frozen:,} frozen parameters, and {sum(p.numel() for p in trainable):,} to train.")
    kept = f"only what takes {LOW_MEMORY} multiply-adds a number" if learning.recompute_below else "all activations"
    learns = str(trainable[0].dtype).removeprefix("torch.")
    print(
        f"Memory {args.memory}: W in {args.dtype}, what learns in {learns}; {kept} kept for the backward pass; "
        "text encoder and VAE on the host until used."
    )

    # Adam's steps are of one size whatever the width; what they add up to over a layer's inputs is not.
    peak = args.lr or (0.02 if full else 0.128) / sd.unet_config.widths[0]
    optimizer = torch.optim.AdamW(trainable, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    # What changes nothing of the result.
    apart = ("out", "states", "resume", "no_report", "save_every", "device")
    apart += ("kernel", "memory", "accumulate", "compile", "batched_teacher")
    fixed = {flag: str(value) for flag, value in asdict(args).items() if flag not in apart}
    weights = data.fingerprint(sd.unet, sd.text_encoder)
    fixed["model"] += f" ({weights})"  # other weights may lie under the same name
    if args.images:
        fixed["images"] += f" ({images.version(pictures)})"  # and other pictures
    else:
        fixed["prompts"] += f" ({digest(str(captions).encode())})"  # or prompts
    losses = resume(out, trainable, optimizer, fixed)  # none, in a new run
    if full and not losses and any(path.exists() for path in results):  # which is not written a second time
        raise ValueError(f"{out} holds a result, and no checkpoint to go on from: name another --out.")
    ranks.as_first([p.data for p in trainable])  # random numbers may differ from one kind of GPU to another

    # The teacher draws its own pictures, or is given some; the student learns from them, and from the way to them.
    folder = args.states or out / "states"
    filling = held.enter_context(lock(folder, wait=True)) if ranks.first else None  # one of the runs that share it
    ranks.wait()
    if args.images:
        states, unusable = images.encode(sd, pictures, captions, folder, ranks)
        for file, reason in (left_out | unusable).items():
            print(f"Left out: {file}: {reason}.")
    else:
        states = data.generate(
            sd,
            captions,
            folder,
            count=args.trajectories,
            steps=args.sample_steps,
            guidance=args.guidance,
            negative_prompt=args.negative_prompt,
            seed=args.seed,
            batch=args.batch,
            stride=args.stride,
            keep_states=args.method != "noised",
            weights=weights,
            ranks=ranks,
        )
    if filling:
        filling.close()
    drawn, caption_of = states.prompts(torch.arange(len(states))).unique(return_inverse=True)
    with at_work(sd.text_encoder, sd.device):  # once for all of them
        encoded = [sd.encode_prompt([captions[i] for i in some]).cpu() for some in drawn.split(64)]
    embeddings = torch.cat(encoded)  # [captions, L, D], on the host: of many they would fill a small card

    if args.compile:  # two graphs, the teacher's and the student's, each of one shape; pictures are drawn by sd.unet
        unet = torch.compile(unet, fullgraph=True, dynamic=False)
    examples = len(states) if args.method == "noised" else len(states.examples)
    part = ranks.share(min(args.batch, examples))
    order = data.batches(examples, args.batch, args.seed, start=len(losses))
    progress = tqdm(initial=len(losses), total=args.steps, desc="distilling", unit="step", disable=not ranks.first)
    recent, unread = deque(maxlen=math.ceil(ENOUGH / part)), []  # what the last updates saw; losses on the device
    with stop_signals() as stop:
        for step in range(len(losses), args.steps):
            chosen = next(order)
            # The teacher's pictures, noised: by dice for the whole batch, however many processes share it.
            if args.method == "noised":
                dice = torch.Generator().manual_seed(args.seed + step)
                t = torch.randint(sd.schedule.train_steps, chosen.shape, generator=dice)
                z_0 = states.ends(chosen)
                z_t = add_noise(sd.schedule, z_0, torch.randn(z_0.shape, generator=dice), t)
                batch = z_t, t, embeddings[caption_of[chosen]]
            # Or states of its trajectories, each with the prediction that the teacher made there.
            else:
                trajectory, taken = states.examples[chosen].T
                z_t, eps_hat, t = states.states(trajectory, taken)
                batch = z_t, t, embeddings[caption_of[trajectory]], eps_hat
            if args.weighting == "min-snr":
                weight = min_snr_weight(sd.schedule, t, MIN_SNR)
            else:  # on trajectories the loss is then the noise error that is asked of the student
                weight = torch.ones(len(t), 1, 1, 1)
            batch = [data.to_device(ranks.part(x), sd.device) for x in (weight, *batch)]

            loss, seen = 0.0, []
            for weight, z_t, t, cond, *stored in in_parts(args.accumulate, *batch):
                if args.method == "noised":  # ask the teacher: two calls of the frozen UNet
                    eps_hat = teacher(
                        unet, z_t, t, cond, uncond.repeat(len(t), 1, 1), args.guidance, args.batched_teacher
                    )
                else:
                    (eps_hat,) = stored
                eps = student(unet, z_t, t, cond)  # one call of the same UNet
                missed = (eps - eps_hat).square()
                share = (weight * missed).mean() * (len(eps) / len(batch[0]))  # of the batch's mean
                share.backward()
                loss += share.detach()
                seen.append((z_t, t, cond, eps_hat))
            recent.append(seen)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, peak, warmup=max(args.steps // 10, 1))
            (loss,) = ranks.mean(trainable, loss)
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()  # here, so that no gradient outlives its update
            progress.update()

            unread.append(torch.stack([loss, norm]))
            stopping = ranks.any(bool(stop))  # a signal may reach one rank an update before the others
            saving = stopping or (step + 1) % args.save_every == 0 or step + 1 == args.steps
            if len(unread) == WINDOW or saving:  # now and then, as a GPU has to be waited for
                for found, length in torch.stack(unread).tolist():
                    if not math.isfinite(found + length):
                        raise ValueError(
                            f"At update {len(losses) + 1} the loss is {found:g} and its gradient's norm {length:g}: "
                            f"lower --lr (it is {peak:g}) or --guidance, in a new --out."
                        )
                    losses.append(found)
                unread.clear()
                progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.5f}", refresh=False)
            if ranks.first and saving:
                far, most = far_off(sd.unet, sum(recent, []))
                if not far <= most:  # nor is NaN
                    raise ValueError(
                        f"After update {step + 1} the student's squared error is {far:g}, where {most:g} is the most "
                        f"that is saved: lower --lr (it is {peak:g}) or --guidance, in a new --out."
                    )
                save_checkpoint(out, trainable, optimizer, losses, fixed)
                if not args.no_report and not stopping:
                    row = draw(sd, "student", shown, steps=args.sample_steps, guidance=args.guidance, batch=args.batch)
                    with written_whole(out / f"pictures/step-{step + 1:06d}.png") as beside:
                        comparison_grid([row], shown).save(beside, "png")
            if stopping:
                progress.close()
                ranks.wait()  # for the checkpoint: torchrun ends all when one ends
                sys.exit(f"Saved after {step + 1} of {args.steps} updates. The same command with --resume goes on.")
    progress.close()
    if not ranks.first:
        return  # what is left is done once
    if sd.device.type == "cuda":
        print(f"At most {torch.cuda.max_memory_allocated(sd.device) / 1e9:.2f} GB of the device were in tensors.")

    metadata = dict(base=name, guidance=f"{args.guidance:g}", negative_prompt=args.negative_prompt, method=args.method)
    metadata |= dict(prediction=sd.schedule.prediction) | ({"teacher_lora": style} if style else {})
    if full:
        result = out / ("student.safetensors" if args.model.is_file() else "student")
        if not result.exists():  # it does, where a run is resumed that was stopped in its report
            change = replaced_by(sd.unet.student)
            write_checkpoint(args.model, change, result, metadata, variant=args.variant, ema=args.ema)
    else:
        result = out / "lora.safetensors"
        save_lora(sd.unet, result, metadata)
    print(f"Wrote {result}")
    if not args.no_report:
        options = dict(guidance=args.guidance, negative_prompt=args.negative_prompt)
        options |= dict(steps=args.sample_steps, batch=args.batch)
        write_report(sd, out, data.spread(held_out, EVALUATED), losses, **options)


if __name__ == "__main__":
    less_memory = (
        "Try, in this order: --memory low, which takes more time; --accumulate with the number of --batch; "
        "--dtype bfloat16; a smaller --batch; a lower --rank."
    )
    with one_sentence("train.py", "stopped. The same command with --resume goes on.", less_memory):
        args = parse(Settings, __doc__)
        with process_group(args.device) as ranks, ExitStack() as held:
            args.device = ranks.device  # of several processes on GPUs each has its own
            main(args, ranks, held)
