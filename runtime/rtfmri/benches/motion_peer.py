"""Peer of the motion figures in BENCHMARKS.md: SimpleITK on the known-motion volumes.

    python motion_peer.py ../shared/scanner/motion        # one thread

Needs SimpleITK and numpy; no part of the product does. Euler3D, correlation metric, regular step gradient descent,
levels 2 and 1, each volume from identity: the most exact of the peers named beside the data. Prints the mean error over
a solid 50 mm sphere (Jenkinson) and processor seconds per volume.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def register(fixed: sitk.Image, moving: sitk.Image) -> np.ndarray:
    """From a place in the fixed volume to that in the moving one, RAS, millimetres, [4, 4]."""
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(start, inPlace=False)
    found = method.Execute(fixed, moving)
    matrix = np.eye(4)
    for axis in range(3):
        unit = np.zeros(3)
        unit[axis] = 1.0
        matrix[:3, axis] = np.array(found.TransformPoint(unit)) - np.array(found.TransformPoint(np.zeros(3)))
    matrix[:3, 3] = found.TransformPoint(np.zeros(3))
    return LPS_TO_RAS @ matrix @ LPS_TO_RAS


def error_mm(truth: np.ndarray, found: np.ndarray, centre: np.ndarray) -> float:
    off = np.linalg.inv(truth) @ found - np.eye(4)
    shift = off[:3, 3] + off[:3, :3] @ centre
    return float(np.sqrt(50.0**2 / 5.0 * np.trace(off[:3, :3].T @ off[:3, :3]) + shift @ shift))


def main() -> None:
    folder = Path(sys.argv[1])
    for file in sorted(folder.glob("**/*_truth.json")):
        truth = json.loads(file.read_text())
        bold = sitk.ReadImage(str(file).replace("_truth.json", "_bold.nii.gz"), sitk.sitkFloat32)
        count = bold.GetSize()[3]
        volumes = [bold[:, :, :, k] for k in range(count)]
        size = np.array(volumes[0].GetSize())
        centre = np.array(volumes[0].TransformContinuousIndexToPhysicalPoint(((size - 1) / 2).tolist()))
        centre = LPS_TO_RAS[:3, :3] @ centre
        matrices = np.array(truth["matrices_ras"])
        clock = time.process_time()
        errors = [
            error_mm(matrices[k], register(volumes[0], volumes[k]), centre) for k in range(1, count)
        ]
        seconds = (time.process_time() - clock) / (count - 1)
        print(f"{file.stem}: mean {np.mean(errors):.3f} mm, largest {np.max(errors):.3f} mm, {seconds:.3f} CPU s a volume")


if __name__ == "__main__":
    main()
