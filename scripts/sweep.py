"""Parts of a benchmark grid as Hydra jobs: one after the other, side by side, on Slurm, or on a Ray cluster.

    python scripts/sweep.py -m shard=0/2,1/2 'grid="benchmark=digits_rot_lt methods=stages orders=0-3 out=runs/digits"'
    python scripts/sweep.py -m shard=0/8,1/8,2/8,3/8,4/8,5/8,6/8,7/8 hydra/launcher=slurm 'grid="..."'

A part holds whole class orders, so 0/8 to 7/8 share out eight or more. Parts only share a folder: `out` has to be on a
file system that all of them see. When all are done, `gen-invariance benchmark report ...` writes the page; a part that
was killed is started again by the same command. `hydra/launcher=local | slurm | on_ray` are in configs/hydra/launcher.
"""

import shlex
import subprocess
import sys

import hydra
from omegaconf import DictConfig

from gen_invariance.configs import config_folder


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="sweep")
def main(config: DictConfig) -> None:
    # A process of its own, since the command composes its settings with Hydra, too, which holds one set a process.
    words = ["benchmark", "run", *shlex.split(config.grid), f"shard={config.shard}"]
    code = subprocess.run([sys.executable, "-m", "gen_invariance.cli.main", *words], check=False).returncode
    if code:
        raise RuntimeError(f"shard {config.shard} ended with exit code {code}; run the same command again")


if __name__ == "__main__":
    main()
