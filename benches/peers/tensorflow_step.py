"""Measures whole training steps of one preset in TensorFlow and prints one JSON line.

    tensorflow_step.py PRESET [--threads N] [--steps N] [--seconds S]

The protocol is that of `lockstep bench step`: random batches in memory taken in turn, 8 steps to warm up, then at least
STEPS steps and SECONDS seconds (2000 steps at most), each timed alone. A step is forward, cross-entropy, backward,
clipping by the global norm at 5, and Adam, in f32, as one `tf.function` over Keras layers. (Compiled by XLA it is slower
on CPUs, characters many times.) Characters enter one-hot, images row by row.
"""

import time

STARTED = time.perf_counter()

import argparse
import json
import os
import resource
import statistics

# preset: cell, layers, hidden width, input width, time steps, rows, classes
CHARACTERS, ROWS = "characters", "rows"
PRESETS = {
    "char-lstm": ("LSTM", 2, 128, 65, 50, 64, 65, CHARACTERS),
    "char-gru": ("GRU", 2, 128, 65, 50, 64, 65, CHARACTERS),
    "char-lstm-512": ("LSTM", 2, 512, 65, 100, 64, 65, CHARACTERS),
    "mnist-rnn": ("SimpleRNN", 1, 150, 28, 28, 150, 10, ROWS),
    "mnist-lstm": ("LSTM", 1, 150, 28, 28, 150, 10, ROWS),
    "mnist-gru": ("GRU", 1, 150, 28, 28, 150, 10, ROWS),
}
WARM_UP = 8
MOST_STEPS = 2000
BATCHES = 32
CLIP_NORM = 5.0
LEARNING_RATE = 1e-3


def arguments():
    parser = argparse.ArgumentParser(description="one TensorFlow measurement, one JSON line")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="time at least this many steps")
    parser.add_argument("--seconds", type=float, default=6.0, help="go on for at least this long")
    return parser.parse_args()


def import_tensorflow(threads):
    """TensorFlow with so many threads, without its greetings and without a GPU."""
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=str(threads))
    import tensorflow

    tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
    tensorflow.config.threading.set_inter_op_parallelism_threads(threads)
    return tensorflow


def trainer(tf, preset):
    """The network of a preset with its data, as a function that does the step of a number and gives the loss."""
    tf.random.set_seed(1)
    cell, layers, hidden, width, steps, rows, classes, kind = PRESETS[preset]
    characters = kind == CHARACTERS
    network = tf.keras.Sequential()
    network.add(tf.keras.Input((steps, width), batch_size=rows))
    for layer in range(layers):
        whole = characters or layer + 1 < layers
        network.add(getattr(tf.keras.layers, cell)(hidden, return_sequences=whole))
    network.add(tf.keras.layers.Dense(classes))
    adam = tf.keras.optimizers.Adam(LEARNING_RATE)
    adam.build(network.trainable_variables)

    draw = lambda shape, below: tf.random.uniform(shape, maxval=below, dtype=tf.int32)
    if characters:
        texts = [draw((rows, steps + 1), width) for _ in range(BATCHES)]
        batches = [(text[:, :-1], text[:, 1:]) for text in texts]
    else:
        image = lambda: tf.cast(draw((rows, steps, width), 256), tf.float32) / 255
        batches = [(image(), draw((rows,), classes)) for _ in range(BATCHES)]

    @tf.function
    def train(inputs, targets):
        with tf.GradientTape() as tape:
            logits = network(tf.one_hot(inputs, width) if characters else inputs, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=logits)
            loss = tf.reduce_mean(losses)
        gradient = tape.gradient(loss, network.trainable_variables)
        gradient, _norm = tf.clip_by_global_norm(gradient, CLIP_NORM)
        adam.apply_gradients(zip(gradient, network.trainable_variables))
        return loss

    return lambda number: float(train(*batches[number % BATCHES]))


def measure(args):
    tf = import_tensorflow(args.threads)
    step = trainer(tf, args.preset)
    loss = step(0)
    start_to_first_step = time.perf_counter() - STARTED
    for number in range(1, WARM_UP):
        step(number)
    times, warm = [], time.perf_counter()
    while len(times) < max(args.steps, 1) or (
        time.perf_counter() - warm < args.seconds and len(times) < MOST_STEPS
    ):
        start = time.perf_counter()
        loss = step(WARM_UP + len(times))
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return {
        "peer": f"tensorflow {tf.__version__}",
        "preset": args.preset,
        "threads": args.threads,
        "batch_size": PRESETS[args.preset][5],
        "n": len(times),
        "ms_med": round(statistics.median(times), 3),
        "ms_min": round(times[0], 3),
        "ms_p90": round(times[-(-9 * len(times) // 10) - 1], 3),
        "ms_max": round(times[-1], 3),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "start_to_first_step_s": round(start_to_first_step, 3),
        "loss": round(loss, 3),
    }


if __name__ == "__main__":
    print(json.dumps(measure(arguments())))
