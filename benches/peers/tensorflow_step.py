"""Measures whole training steps of one preset in TensorFlow and prints one JSON line.

    tensorflow_step.py PRESET [--threads N] [--steps N] [--seconds S]

The protocol is in measure.py. A step is forward, cross-entropy, backward, clipping by the global norm at 5, and Adam, in
f32, as one `tf.function` over Keras layers. (Compiled by XLA it is slower on CPUs, characters many times.) Characters enter
one-hot, images row by row.
"""

from measure import BATCHES, CHARACTERS, CLIP_NORM, LEARNING_RATE, PRESETS, measure, parser

import json
import os


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
        kind_of_layer = "SimpleRNN" if cell == "RNN" else cell
        network.add(getattr(tf.keras.layers, kind_of_layer)(hidden, return_sequences=whole))
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


def main():
    args = parser("TensorFlow").parse_args()
    tf = import_tensorflow(args.threads)
    print(json.dumps(measure(args, f"tensorflow {tf.__version__}", trainer(tf, args.preset))))


if __name__ == "__main__":
    main()
