"""What the student learns from (``train.py --source``): the teacher's trajectories, its images, or your own."""

import argparse
from collections import Counter
from pathlib import Path

from minidistill.data import images
from minidistill.data.examples import Examples, NoisedLatents, StoredStates, prompts_of
from minidistill.data.prompts import prompt_split
from minidistill.data.trajectories import Trajectories, generate, strided
from minidistill.formats.files import digest
from minidistill.pipeline import StableDiffusion
from minidistill.training.command_line import check_interval
from minidistill.training.distributed import Ranks


class FromTrajectories:
    """States on the teacher's way from noise to image, each with the guided prediction made there.

    Attributes:
        captions, held_out: prompts to learn from, and prompts for evaluation.
        stamp: by flag, a fingerprint of the prompts or images.
        asks_teacher: True if the teacher is called in the loop; False if its predictions are stored.
        batches: the class that makes batches from the stored latents.
    """

    asks_teacher = False
    batches = StoredStates

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.captions, self.held_out = prompt_split(args.model, args.prompts)
        self.stamp = {"prompts": digest(str(self.captions).encode())}

    def latents(self, sd: StableDiffusion, folder: Path, weights: str, ranks: Ranks) -> Trajectories:
        """Have the teacher sample what is missing in ``folder``. ``weights`` is its fingerprint."""
        args = self.args
        return generate(
            sd,
            self.captions,
            folder,
            count=args.trajectories,
            steps=args.sample_steps,
            guidance=args.guidance,
            negative_prompt=args.negative_prompt,
            interval=args.interval,
            seed=args.seed,
            batch=args.sample_batch or args.batch,
            stride=args.stride,
            keep_states=not self.asks_teacher,
            student_steps=args.student_steps,
            weights=weights,
            rank=ranks.rank,
            world=ranks.world,
            wait=ranks.wait,
        )

    def prepare(self, sd: StableDiffusion, folder: Path, weights: str, ranks: Ranks) -> Examples:
        """Everything to learn from, with the prompts encoded."""
        args = self.args
        if not (self.asks_teacher or args.student_steps):
            timesteps = sd.schedule.timesteps(args.sample_steps)
            shards = -(-args.trajectories // (args.sample_batch or args.batch))
            stored = {t for shard in range(shards) for t in strided(timesteps, args.stride, shard)}
            check_interval(args.interval, sorted(stored))
        latents = self.latents(sd, folder, weights, ranks)
        prompts, prompt_of = prompts_of(sd, self.captions, latents)
        settings = dict(weighting=args.weighting, student_steps=args.student_steps)
        return self.batches(latents, prompts, prompt_of, sd.schedule, args.batch, args.seed, **settings)


class FromNoised(FromTrajectories):
    """Images the teacher sampled, noised afresh, with the teacher in the loop: the paper's way."""

    asks_teacher = True
    batches = NoisedLatents


class FromImages(FromNoised):
    """Your own images with captions, noised afresh, with the teacher in the loop."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.images, self.left_out = images.read_folder(args.images)
        captions = [caption for caption, _ in Counter(image.caption for image in self.images).most_common()]
        self.held_out = captions[9::10] or captions[-1:]  # of ten captions, the one with the fewest images
        self.captions = [caption for caption in captions if caption not in set(self.held_out)] or self.held_out
        self.stamp = {"images": images.version(self.images)}

    def latents(self, sd: StableDiffusion, folder: Path, weights: str, ranks: Ranks) -> images.ImageLatents:
        latents, unusable = images.encode(sd, self.images, self.captions, folder, ranks.rank, ranks.wait)
        for file, reason in (self.left_out | unusable).items():
            print(f"Left out: {file}: {reason}.")
        print(f"Learning from {len(latents)} images.")
        return latents


SOURCES = {"trajectories": FromTrajectories, "noised": FromNoised, "images": FromImages}
