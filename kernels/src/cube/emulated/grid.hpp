// Runs the kernel KERNEL, whose text is above, on a grid of cubes of MOST_THREADS threads at most. One thread of the CPU runs
// all threads of all cubes, one after the other; whoever waits for the others of its cube hands over to the next. The order
// is ours to choose: what depends on it is a race.

// As much as the launch gives each cube, and what nobody may touch.
constexpr size_t FENCE = 256;
alignas(256) unsigned char dynamic_shared_mem[SHARED_BYTES + FENCE];

namespace gpu {

const char *fault;

struct Thread {
    jmp_buf here;
    bool has_stack;
    int line;  // Where it waits.
    enum { READY, WAITING, ENDED } state;
};

static Thread threads[MOST_THREADS];
static unsigned running;
static jmp_buf scheduler;
static void **arguments;

static void hand_over() {
    if (!_setjmp(threads[running].here)) _longjmp(scheduler, 1);
}

void wait(int line) {
    threads[running].state = Thread::WAITING;
    threads[running].line = line;
    hand_over();
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(*static_cast<A *>(arguments[I])...);
}

template <class... A>
static void call(void (*kernel)(A...)) {
    call(kernel, std::index_sequence_for<A...>{});
}

// The same thread of one cube after the other.
static void run_thread() {
    for (;;) {
        call(KERNEL);
        threads[running].state = Thread::ENDED;
        hand_over();
    }
}

// Goes on with a thread until it waits or ends. Its stack is its own.
static void resume(unsigned thread, unsigned char *stacks, size_t stack_bytes) {
    running = thread;
    threadIdx = {thread, 0, 0};
    if (_setjmp(scheduler)) return;
    if (threads[thread].has_stack) _longjmp(threads[thread].here, 1);
    threads[thread].has_stack = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + thread * stack_bytes;
    start.uc_stack.ss_size = stack_bytes;
    start.uc_link = nullptr;
    makecontext(&start, run_thread, 0);
    setcontext(&start);
}

static unsigned divisor(unsigned a, unsigned b) { return b == 0 ? a : divisor(b, a % b); }

// Some order of n things: upwards for the seed 0, else by strides without a common divisor.
struct Order {
    unsigned n, first = 0, stride = 1;

    Order(unsigned n, unsigned long long seed) : n(n) {
        if (seed == 0 || n == 1) return;
        seed *= 0x9E3779B97F4A7C15u;
        first = (seed >> 33) % n;
        stride = 1 + (seed >> 13) % n;
        while (divisor(stride, n) != 1) stride++;
    }

    unsigned operator()(unsigned i) const { return (first + (unsigned long long)i * stride) % n; }
};

static const char *run_cube(unsigned char *stacks, size_t stack_bytes, unsigned long long seed) {
    // Like a GPU's memory at the start it holds anything: NaN, as floats.
    memset(dynamic_shared_mem, 0xFF, sizeof dynamic_shared_mem);
    unsigned count = blockDim.x;
    for (unsigned i = 0; i < count; i++) threads[i].state = Thread::READY;
    for (unsigned long long interval = 1;; interval++) {
        Order order(count, seed * interval);
        for (unsigned i = 0; i < count; i++) resume(order(i), stacks, stack_bytes);
        if (fault) return fault;
        for (unsigned i = 1; i < count; i++) {
            if (threads[i].state != threads[0].state) return "some threads of a cube have ended, others wait for them";
            if (threads[i].state == Thread::WAITING && threads[i].line != threads[0].line)
                return "threads of a cube wait at different places";
        }
        if (threads[0].state == Thread::ENDED) break;
    }
    for (size_t i = SHARED_BYTES; i < sizeof dynamic_shared_mem; i++)
        if (dynamic_shared_mem[i] != 0xFF) return "it has written beyond its shared memory";
    return nullptr;
}

}  // namespace gpu

// Null, or what is wrong with the kernel.
extern "C" const char *run_grid(void **arguments, const unsigned *cubes, unsigned count, unsigned char *stacks,
                                size_t stack_bytes, unsigned long long seed) {
    gpu::arguments = arguments;
    gpu::fault = nullptr;
    for (gpu::Thread &thread : gpu::threads) thread.has_stack = false;
    gridDim = {cubes[0], cubes[1], cubes[2]};
    blockDim = {count, 1, 1};
    gpu::Order order(cubes[0] * cubes[1] * cubes[2], seed);
    for (unsigned i = 0; i < order.n; i++) {
        unsigned cube = order(i);
        blockIdx = {cube % gridDim.x, cube / gridDim.x % gridDim.y, cube / gridDim.x / gridDim.y};
        if (const char *fault = gpu::run_cube(stacks, stack_bytes, seed)) return fault;
    }
    return nullptr;
}
