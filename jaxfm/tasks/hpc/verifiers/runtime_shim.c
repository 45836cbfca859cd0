/* Tells ThreadSanitizer the order that libgomp keeps.
 *
 * libgomp is not instrumented, so that its fork, join, barrier, lock and task dependence are
 * invisible. Linked with --wrap for each entry point, this file releases a synchronisation object
 * of its own before libgomp orders something and acquires it after. Compiled without
 * -fsanitize=thread. Objects of heap memory are never freed: each belongs to one event. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

void __tsan_acquire(void *);
void __tsan_release(void *);
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *);
void __tsan_switch_to_fiber(void *, unsigned flags);
enum { ORDERED = 0, UNORDERED = 1, STACK = 1 << 17 };

#define WRAP(result, name, ...)                                                                  \
    result __real_##name(__VA_ARGS__);                                                           \
    result __wrap_##name(__VA_ARGS__)

/* A team's fork and join, and two barriers in turn: a fast thread, already on its way to the next
 * barrier, must not order what slower ones read of this one. */
typedef struct team { long fork, join, barrier[2]; } team;
typedef struct task { long created, children, done; struct group *group; } task;
typedef struct group { long ended; struct group *outer; } group;
typedef struct { team *team; int phase; task *task; void *home, *section; } place;
static __thread place here;
static task outermost;
static task *current(void) { return here.task ? here.task : &outermost; }

/* Regions ---------------------------------------------------------------------------------- */
typedef struct { void (*fn)(void *); void *data; team team; } region;

static void member(void *argument)
{
    region *r = argument;
    place outer = here;
    task *own = calloc(1, sizeof(task));
    here = (place){&r->team, 0, own, NULL, NULL};
    __tsan_acquire(&r->team.fork);
    r->fn(r->data);
    __tsan_release(&r->team.join);
    here = outer;
}

#define REGION(name, parameters, ...)                                                            \
    void __real_##name parameters;                                                               \
    void __wrap_##name parameters                                                                \
    {                                                                                            \
        region *r = calloc(1, sizeof(region));                                                   \
        r->fn = fn, r->data = data;                                                              \
        __tsan_release(&r->team.fork);                                                           \
        __real_##name(member, r, ##__VA_ARGS__);                                                 \
        __tsan_acquire(&r->team.join);                                                           \
        __tsan_acquire(&r->team.barrier[0]);                                                     \
        __tsan_acquire(&r->team.barrier[1]);                                                     \
    }
#define LOOP_REGION(name)                                                                        \
    REGION(name, (void (*fn)(void *), void *data, unsigned n, long a, long b, long s, long c,    \
                  unsigned flags), n, a, b, s, c, flags)
#define PLAIN_LOOP_REGION(name)                                                                  \
    REGION(name, (void (*fn)(void *), void *data, unsigned n, long a, long b, long s,            \
                  unsigned flags), n, a, b, s, flags)
REGION(GOMP_parallel, (void (*fn)(void *), void *data, unsigned n, unsigned flags), n, flags)
REGION(GOMP_parallel_sections,
       (void (*fn)(void *), void *data, unsigned n, unsigned count, unsigned flags), n, count, flags)
LOOP_REGION(GOMP_parallel_loop_static)
LOOP_REGION(GOMP_parallel_loop_dynamic)
LOOP_REGION(GOMP_parallel_loop_guided)
LOOP_REGION(GOMP_parallel_loop_nonmonotonic_dynamic)
LOOP_REGION(GOMP_parallel_loop_nonmonotonic_guided)
PLAIN_LOOP_REGION(GOMP_parallel_loop_runtime)
PLAIN_LOOP_REGION(GOMP_parallel_loop_nonmonotonic_runtime)
PLAIN_LOOP_REGION(GOMP_parallel_loop_maybe_nonmonotonic_runtime)

/* Barriers --------------------------------------------------------------------------------- */
static void *arrive(void)
{
    static team alone;
    long *barrier = &(here.team ? here.team : &alone)->barrier[here.phase];
    __tsan_release(barrier);
    return barrier;
}
static void leave(void *barrier) { __tsan_acquire(barrier); here.phase ^= 1; }

#define BARRIER(name)                                                                            \
    WRAP(void, name, void) { void *b = arrive(); __real_##name(); leave(b); }
BARRIER(GOMP_barrier)
BARRIER(GOMP_loop_end)
BARRIER(GOMP_sections_end)

/* Any thread may run a section: each is a logical thread of its own, whoever runs it. */
static unsigned section(unsigned number)
{
    if (here.section) {
        if (here.team) {
            __tsan_release(&here.team->barrier[here.phase]);
            __tsan_release(&here.team->join);
        }
        __tsan_switch_to_fiber(here.home, UNORDERED);
        __tsan_destroy_fiber(here.section);
        here.section = NULL;
    }
    if (number) {
        here.home = __tsan_get_current_fiber();
        here.section = __tsan_create_fiber(0);
        __tsan_switch_to_fiber(here.section, ORDERED);
    }
    return number;
}
WRAP(unsigned, GOMP_sections_start, unsigned count)
{
    return section(__real_GOMP_sections_start(count));
}
WRAP(unsigned, GOMP_sections_next, void) { return section(__real_GOMP_sections_next()); }

static long copies;
WRAP(void *, GOMP_single_copy_start, void)
{
    void *given = __real_GOMP_single_copy_start();
    if (given) __tsan_acquire(&copies);
    return given;
}
WRAP(void, GOMP_single_copy_end, void *data) { __tsan_release(&copies); __real_GOMP_single_copy_end(data); }

/* Mutual exclusion ------------------------------------------------------------------------- */
static long critical, atomic, ordered;
#define GUARD(start, end, object)                                                                \
    WRAP(void, start, void) { __real_##start(); __tsan_acquire(&object); }                       \
    WRAP(void, end, void) { __tsan_release(&object); __real_##end(); }
#define LOCK(start, end)                                                                         \
    WRAP(void, start, void **lock) { __real_##start(lock); __tsan_acquire(lock); }               \
    WRAP(void, end, void **lock) { __tsan_release(lock); __real_##end(lock); }
GUARD(GOMP_critical_start, GOMP_critical_end, critical)
GUARD(GOMP_atomic_start, GOMP_atomic_end, atomic)
GUARD(GOMP_ordered_start, GOMP_ordered_end, ordered)
LOCK(GOMP_critical_name_start, GOMP_critical_name_end)

/* gcc updates floating-point numbers atomically by an exchange that it does not instrument, so that
 * a plain read beside it would race unseen. With -fno-inline-atomics it calls these instead. An
 * OpenMP atomic orders nothing else: relaxed. */
#define EXCHANGE(bytes, bits, word)                                                              \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile word *, word *, word, int, int);  \
    bool exchange##bytes(volatile void *, void *, word, int, int)                                \
        __asm__("__atomic_compare_exchange_" #bytes);                                            \
    bool exchange##bytes(volatile void *at, void *expected, word value, int success, int failure)\
    {                                                                                            \
        (void)success, (void)failure;                                                            \
        return __tsan_atomic##bits##_compare_exchange_strong(at, expected, value, 0, 0);         \
    }
EXCHANGE(4, 32, uint32_t)
EXCHANGE(8, 64, uint64_t)
LOCK(omp_set_lock, omp_unset_lock)
LOCK(omp_set_nest_lock, omp_unset_nest_lock)
WRAP(int, omp_test_lock, void **lock)
{
    int got = __real_omp_test_lock(lock);
    if (got) __tsan_acquire(lock);
    return got;
}

/* Tasks ------------------------------------------------------------------------------------ */
/* Sync objects of a dependence, by the parent and the address: what readers and writers release. */
static long read_by[1 << 16], written_by[1 << 16];
static unsigned cell(task *parent, void *address)
{
    uintptr_t key = ((uintptr_t)parent >> 4) * 31 + ((uintptr_t)address >> 2);
    return (key * 0x9e3779b97f4a7c15u) >> 48;
}

typedef struct {
    team *team;
    task own, *parent;
    void (*fn)(void *);
    char *data;
    unsigned inputs, outputs, *cells; /* cells of outputs first */
    void *stack;
    ucontext_t context, caller;
} job;

/* The list is (count, outputs, addresses...) or (0, count, outputs, exclusive, inputs, ...). */
static void read_dependences(job *j, void **list)
{
    bool old = list[0] != NULL;
    unsigned count = (uintptr_t)list[old ? 0 : 1];
    j->outputs = (uintptr_t)list[old ? 1 : 2] + (old ? 0 : (uintptr_t)list[3]);
    j->inputs = count - j->outputs;
    j->cells = malloc(count * sizeof(unsigned));
    for (unsigned k = 0; k < count; k++) j->cells[k] = cell(j->parent, list[(old ? 2 : 5) + k]);
}

static void acquire_dependences(job *j)
{
    for (unsigned k = 0; k < j->outputs + j->inputs; k++) {
        __tsan_acquire(&written_by[j->cells[k]]);
        if (k < j->outputs) __tsan_acquire(&read_by[j->cells[k]]);
    }
}

static __thread job *entered;
static void body(void)
{
    job *j = entered;
    j->fn(j->data);
    swapcontext(&j->context, &j->caller);
}

/* A task is a logical thread of its own, whoever runs it, with a stack of its own, since another
 * task on the same stack would seem to race with it. */
static void run_job(void *argument)
{
    job *j = *(job **)argument;
    place outer = here;
    void *thread = __tsan_get_current_fiber(), *fiber = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(fiber, UNORDERED);
    /* At the end of a region a thread has left it already and still runs its tasks. */
    here.team = j->team;
    here.task = &j->own, here.home = here.section = NULL;
    __tsan_acquire(&j->own.created);
    acquire_dependences(j);
    getcontext(&j->context);
    j->context.uc_stack.ss_sp = j->stack;
    j->context.uc_stack.ss_size = STACK;
    makecontext(&j->context, body, 0);
    entered = j;
    swapcontext(&j->caller, &j->context);
    for (unsigned k = 0; k < j->outputs + j->inputs; k++)
        __tsan_release(k < j->outputs ? &written_by[j->cells[k]] : &read_by[j->cells[k]]);
    __tsan_release(&j->parent->children);
    __tsan_release(&j->own.done);
    for (group *g = j->own.group; g; g = g->outer) __tsan_release(&g->ended);
    /* A barrier waits for all tasks; the object of the phase this thread is in is acquired there. */
    if (here.team) {
        __tsan_release(&here.team->barrier[here.phase]);
        __tsan_release(&here.team->join);
    }
    here.team = outer.team;
    here.task = outer.task, here.home = outer.home, here.section = outer.section;
    __tsan_switch_to_fiber(thread, UNORDERED);
    __tsan_destroy_fiber(fiber);
}

WRAP(void, GOMP_task, void (*fn)(void *), void *data, void (*copy)(void *, void *), long size,
     long align, bool deferred, unsigned flags, void **depend, int priority, void *detach)
{
    job *j = calloc(1, sizeof(job));
    j->parent = current(), j->team = here.team, j->fn = fn, j->own.group = j->parent->group;
    char *room = malloc(size + align);
    j->data = (char *)(((uintptr_t)room + align - 1) & ~(uintptr_t)(align - 1));
    if (copy) copy(j->data, data); else memcpy(j->data, data, size);
    j->stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (flags & 8) read_dependences(j, depend);
    __tsan_release(&j->own.created);
    __real_GOMP_task(run_job, &j, NULL, sizeof j, _Alignof(job *), deferred, flags, depend,
                     priority, detach);
    if (!deferred || (flags & 2)) __tsan_acquire(&j->own.done);
}
WRAP(void, GOMP_taskwait, void) { __real_GOMP_taskwait(); __tsan_acquire(&current()->children); }
WRAP(void, GOMP_taskwait_depend, void **depend)
{
    job j = {.parent = current()};
    __real_GOMP_taskwait_depend(depend);
    read_dependences(&j, depend);
    acquire_dependences(&j);
}
WRAP(void, GOMP_taskgroup_start, void)
{
    group *g = calloc(1, sizeof(group));
    g->outer = current()->group;
    current()->group = g;
    __real_GOMP_taskgroup_start();
}
WRAP(void, GOMP_taskgroup_end, void)
{
    group *g = current()->group;
    __real_GOMP_taskgroup_end();
    __tsan_acquire(&g->ended);
    current()->group = g->outer;
}
