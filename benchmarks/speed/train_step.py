"""The training step, ours against PyTorch's best form and the machine's limits.

    python -m benchmarks.speed.train_step --out=DIR [--short] [--batch N ...]
        [--precision NAME ...]

The "paper" network with response normalisation and dropout: forward pass, gradients,
SGD with momentum and weight decay, from uint8 images of 224 x 224 less their mean. On
a CPU float32 at batch 128; on a GPU bfloat16, float32 and tensorfloat32 at 128 and
1,024. Operations are counted without conv1's gradient of the images, which nobody
needs.
"""

from benchmarks.speed import side_by_side

if __name__ == "__main__":
    side_by_side.run("train_step", __doc__)
