"""One trial's fit through nilearn, on the run that the benchmark beside this file left behind.

    cargo bench -p rtfmri --bench glm
    pip install nilearn==0.14.1
    python runtime/rtfmri/benches/glm_peer.py [target/tmp/glm-bench]

Prints, for each noise model and number of volumes, the time of nilearn's FirstLevelModel (fit and
contrast) and of its bare run_glm, on one thread, and how far betas and variances lie apart.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import math
import sys
import time
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pandas
from nilearn.glm.contrasts import compute_contrast
from nilearn.glm.first_level import (
    FirstLevelModel,
    make_first_level_design_matrix,
    run_glm,
)

TR_S = 1.5
DELAY_S = 7.5
TRIALS = [(288, 423.0), (144, 207.0)]
REPEATS = 5

warnings.filterwarnings("ignore")


def best(work):
    """The least CPU and wall seconds of a few runs, and the last result."""
    cpu, wall = math.inf, math.inf
    for _ in range(REPEATS):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        result = work()
        cpu = min(cpu, time.process_time() - cpu_start)
        wall = min(wall, time.perf_counter() - wall_start)
    return cpu, wall, result


def apart(found, expected, scale):
    """Largest difference, as a share of the scale, and how many lie more than 1e-6 apart."""
    off = np.abs(found - expected) / scale
    return f"{np.median(off):.1e} (median), {np.sum(off > 1e-6)} of {off.size} beyond 1e-6"


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "target/tmp/glm-bench")
    bold = np.load(folder / "bold.npy")
    events = pandas.read_csv(folder / "events.tsv", sep="\t")
    confounds = pandas.read_csv(folder / "confounds.tsv", sep="\t")
    for noise in ("ar1", "ols"):
        for volumes, onset in TRIALS:
            last = (volumes - 1) * TR_S
            assert math.floor((onset + DELAY_S) / TR_S) + 1 == volumes
            so_far = events[events.onset <= last].copy()
            probe = so_far.onset == onset
            so_far["trial_type"] = np.where(probe, "probe", "reference")
            design = make_first_level_design_matrix(
                np.arange(volumes) * TR_S,
                so_far,
                hrf_model="glover",
                drift_model="cosine",
                high_pass=0.01,
                add_regs=confounds.values[:volumes],
                add_reg_names=list(confounds.columns),
            )
            weights = (design.columns == "probe").astype(float)
            series = bold[:volumes]
            image = nibabel.Nifti1Image(series.T[:, None, None, :], np.eye(4))
            mask = nibabel.Nifti1Image(np.ones((series.shape[1], 1, 1), np.int8), np.eye(4))

            def model():
                fitted = FirstLevelModel(
                    t_r=TR_S,
                    slice_time_ref=0,
                    noise_model=noise,
                    signal_scaling=False,
                    standardize=False,
                    mask_img=mask,
                    n_jobs=1,
                ).fit(image, design_matrices=design)
                return fitted.compute_contrast(weights, output_type="effect_size")

            def bare():
                labels, results = run_glm(series, design.values, noise_model=noise, n_jobs=1)
                return compute_contrast(labels, results, weights, stat_type="t")

            model_cpu, model_wall, _ = best(model)
            bare_cpu, bare_wall, contrast = best(bare)
            print(
                f"{noise}, {series.shape[1]} voxels, {volumes} volumes: "
                f"FirstLevelModel {model_cpu * 1e3:.0f} ms CPU, {model_wall * 1e3:.0f} ms wall; "
                f"run_glm {bare_cpu * 1e3:.0f} ms CPU, {bare_wall * 1e3:.0f} ms wall"
            )
            betas = np.load(folder / f"betas_{noise}_{volumes}.npy")
            variance = np.load(folder / f"variance_{noise}_{volumes}.npy")
            expected = contrast.effect_size().ravel()
            print("  betas apart by", apart(betas, expected, np.sqrt(np.mean(expected**2))))
            expected = contrast.effect_variance().ravel()
            print("  variances apart by", apart(variance, expected, expected))


main()
