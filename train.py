"""Distil a guided teacher, two UNet calls a step, into a LoRA student that needs one.

  python train.py                                  the model that ships here, in minutes on a laptop
  python train.py --model FOLDER --dtype bfloat16  your own Stable Diffusion 1.x or 2.x, on a GPU

Teacher and student are one network: the student is what it becomes with the LoRA switched on.
"""

import sys
from collections import deque
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minidistill import data, inject_lora, load, save_lora
from minidistill.distill import FullStudent, is_lost, learning_rate, student, teacher
from minidistill.evaluate import comparison_grid, draw
from minidistill.files import written_whole
from minidistill.lora import DEFAULT_TARGETS
from minidistill.lora_files import merge_file
from minidistill.lora_formats import read_lora
from minidistill.merged import replaced_by, write_checkpoint
from minidistill.parallel import Ranks, process_group
from minidistill.report import write_report
from minidistill.run import checkpoint_files, lock, resume, save_checkpoint, stop_signals
from minidistill.schedule import add_noise
from minidistill.settings import ModelSettings, ScaledFile, count, one_sentence, parse, positive, setting

EVALUATED = 24  # held-out prompts in the report
SHOWN = 8  # and in the pictures drawn on the way
WINDOW = 10  # updates that show whether the student is lost, and not a single batch


@dataclass
class Settings(ModelSettings):
    dtype: str = setting("float32", "of the frozen weights", "model", choices=("float32", "bfloat16", "float64"))
    prompts: Path = setting(
        None, "text file, one prompt a line (default: the model's own, or ours)", "teacher", type=Path
    )
    guidance: float = setting(
        2.5, "guidance scale, which the student learns; 7.5 is usual for the large models", "teacher", type=positive
    )
    negative_prompt: str = setting("", "what guidance leads away from, which the student learns too", "teacher")
    teacher_lora: ScaledFile = setting(
        None,
        "a style, any LoRA file, that the teacher draws in: merged into W",
        "teacher",
        type=ScaledFile.parse,
        metavar="FILE[:SCALE]",
    )
    sample_steps: int = setting(25, "DDIM steps of a trajectory", "teacher", type=count)
    stride: int = setting(3, "of these steps, take only every N-th: more pictures in the time", "teacher", type=count)
    trajectories: int = setting(480, "how many pictures the teacher draws to learn from", "teacher", type=count)
    method: str = setting(
        "trajectories",
        "a LoRA learns from the teacher's trajectories, or from its pictures noised afresh, teacher in the loop; "
        "or a full copy of the UNet learns from the trajectories",
        "student",
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
    steps: int = setting(400, "updates of the LoRA", "student", type=count)
    batch: int = setting(16, "examples an update, in all processes; pictures drawn at once", "student", type=count)
    lr: float = setting(
        None,
        "peak learning rate (default: 0.128 / the UNet's first width; of a full copy 0.02)",
        "student",
        type=positive,
    )
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory, more time", "student")
    kernel: str = setting(
        "auto",
        "what computes the LoRA's layers: one kernel for W and the pair (on a GPU, in bfloat16), or PyTorch",
        "student",
        choices=("auto", "fused", "torch"),
    )
    out: Path = setting(None, "folder of this run (default: runs/<name of the model>)", "run", type=Path)
    seed: int = setting(0, "of everything random", "run")
    states: Path = setting(
        None, "folder of the trajectories, which several runs may share (default: in --out)", "run", type=Path
    )
    save_every: int = setting(100, "updates from a checkpoint and its pictures to the next", "run", type=count)
    resume: bool = setting(False, "go on from the last checkpoint in --out, if there is one", "run")
    no_report: bool = setting(False, "only the LoRA: no evaluation, no pictures", "run")


def main(args: Settings, ranks: Ranks, held: ExitStack) -> None:
    name = args.model.resolve().name
    out = args.out or Path("runs") / name
    results = [out / "lora.safetensors", out / "student", out / "student.safetensors"]
    if any(path.exists() for path in [*checkpoint_files(out), *results]) and not args.resume:
        raise ValueError(f"{out} holds a run already: add --resume to go on with it, or name another --out.")
    if args.guidance == 1:
        raise ValueError("--guidance 1 is no guidance, which takes one pass as it is: there is nothing to distil.")
    ranks.share(args.batch)  # one that the processes cannot share is refused before any work, too

    # One network: the teacher, and beside some of its layers the low-rank pairs that make it the student.
    sd = load(args.model, **args.load_options())
    style = ""
    if args.teacher_lora:  # into W itself, which is the student's too
        file, scale = args.teacher_lora
        merge_file(sd.unet, read_lora(file, scale))
        style = f"{file.name}:{scale:g}"
    captions, held_out = data.prompt_split(args.model, args.prompts)
    shown = data.spread(held_out, SHOWN)
    torch.manual_seed(args.seed)
    if full := args.method == "full":  # plain distillation: two networks, for comparison
        unet = FullStudent(sd.unet, deepcopy(sd.unet).float().requires_grad_())
        unet.student.checkpoint_blocks = args.recompute
    else:
        unet = inject_lora(sd.unet, args.rank, args.alpha, args.targets or DEFAULT_TARGETS, args.kernel)
        unet.base.checkpoint_blocks = args.recompute
    sd.unet = unet
    trainable = [p for p in unet.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in unet.parameters() if not p.requires_grad)
    sd.schedule.timesteps(args.sample_steps)  # a number of steps that DDIM cannot take is refused before any work
    uncond = sd.encode_prompt([args.negative_prompt])  # [1, L, D]
    out.mkdir(parents=True, exist_ok=True)
    if ranks.first:
        held.enter_context(lock(out))
    ranks.wait()
    print(f"{name}: {frozen:,} frozen parameters, and {sum(p.numel() for p in trainable):,} to train.")

    # Adam's steps are of one size whatever the width; what they add up to over a layer's inputs is not.
    peak = args.lr or (0.02 if full else 0.128) / sd.unet_config.widths[0]
    optimizer = torch.optim.AdamW(trainable, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    # What changes nothing of the result.
    apart = ("out", "states", "resume", "no_report", "save_every", "device", "kernel", "recompute")
    fixed = {flag: str(value) for flag, value in asdict(args).items() if flag not in apart}
    losses = resume(out, trainable, optimizer, fixed)  # none, in a new run

    # The teacher draws its own pictures; the student learns from them, and from the way to them.
    states = data.generate(
        sd,
        captions,
        args.states or out / "states",
        count=args.trajectories,
        steps=args.sample_steps,
        guidance=args.guidance,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        batch=args.batch,
        stride=args.stride,
        keep_states=args.method != "noised",
        ranks=ranks,
    )
    drawn = states.prompts(torch.arange(len(states))).split(64)
    embeddings = torch.cat([sd.encode_prompt([captions[i] for i in some]) for some in drawn])  # [trajectories, L, D]

    examples = len(states) if args.method == "noised" else len(states.examples)
    order = data.batches(examples, args.batch, args.seed, start=len(losses))
    shown_as = dict(desc="distilling", unit="step", disable=not ranks.first)
    progress = tqdm(initial=len(losses), total=args.steps, **shown_as)
    recent = deque(maxlen=WINDOW)
    with stop_signals() as stop:
        for step in range(len(losses), args.steps):
            chosen = next(order)
            # Noise the teacher's picture, and ask the teacher: two calls of the frozen UNet.
            if args.method == "noised":
                dice = torch.Generator().manual_seed(args.seed + step)
                t = torch.randint(sd.schedule.train_steps, chosen.shape, generator=dice)
                z_0 = states.ends(chosen)
                z_t = add_noise(sd.schedule, z_0, torch.randn(z_0.shape, generator=dice), t)
                # Drawn for the whole batch, so that nothing depends on how many processes share it.
                z_t, t, chosen = (ranks.part(x) for x in (z_t, t, chosen))
                z_t, t, cond = z_t.to(sd.device), t.to(sd.device), embeddings[chosen]
                eps_hat = teacher(unet, z_t, t, cond, uncond.expand_as(cond), args.guidance)
            # Every state of a trajectory comes with the prediction that the teacher made there.
            else:
                trajectory, taken = states.examples[ranks.part(chosen)].T
                z_t, eps_hat, t = (x.to(sd.device) for x in states.states(trajectory, taken))
                cond = embeddings[trajectory]
            eps = student(unet, z_t, t, cond)  # one call of the same UNet

            # Unweighted over t: on trajectories this is the very noise error that is asked of the student.
            loss = F.mse_loss(eps, eps_hat)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, peak, warmup=max(args.steps // 10, 1))
            loss.backward()
            recent.append((z_t, t, cond, eps_hat, loss.detach()))
            (loss,) = ranks.mean(trainable, loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            if not (loss + norm).isfinite():
                raise ValueError(
                    f"At update {step + 1} the loss is {loss:g} and its gradient's norm {norm:g}: "
                    f"lower --lr (it is {peak:g}) or --guidance, in a new --out."
                )
            optimizer.step()
            optimizer.zero_grad()  # here, so that no gradient outlives its update

            losses.append(loss.item())
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.5f}", refresh=False)
            progress.update()
            stopping = ranks.any(bool(stop))  # a signal may reach one rank an update before the others
            if ranks.first and (stopping or (step + 1) % args.save_every == 0 or step + 1 == args.steps):
                if len(recent) == WINDOW and is_lost(unet, recent):
                    raise ValueError(
                        f"At update {step + 1} the loss is {loss:g}, far above what it was without any LoRA: "
                        f"lower --lr (it is {peak:g}) or --guidance, in a new --out."
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

    metadata = dict(base=name, guidance=f"{args.guidance:g}", negative_prompt=args.negative_prompt, method=args.method)
    metadata |= dict(prediction=sd.schedule.prediction) | ({"teacher_lora": style} if style else {})
    if full:
        result = out / ("student.safetensors" if args.model.is_file() else "student")
        if not result.exists():  # it does, where a run is resumed that was stopped in its report
            change = replaced_by(unet.student)
            write_checkpoint(args.model, change, result, metadata, variant=args.variant, ema=args.ema)
    else:
        result = out / "lora.safetensors"
        save_lora(unet, result, metadata)
    print(f"Wrote {result}")
    if not args.no_report:
        options = dict(guidance=args.guidance, negative_prompt=args.negative_prompt)
        options |= dict(steps=args.sample_steps, batch=args.batch)
        write_report(sd, out, data.spread(held_out, EVALUATED), losses, **options)


if __name__ == "__main__":
    less_memory = "Try, in this order: --batch 1; --dtype bfloat16; --recompute, which takes more time; a lower --rank."
    with one_sentence("train.py", "stopped. The same command with --resume goes on.", less_memory):
        args = parse(Settings, __doc__)
        with process_group(args.device) as ranks, ExitStack() as held:
            args.device = ranks.device  # of several processes on GPUs each has its own
            main(args, ranks, held)
