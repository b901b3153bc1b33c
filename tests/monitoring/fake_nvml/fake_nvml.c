/* A libnvidia-ml.so.1 for tests: the functions the GPU sampler calls, with values from a file.
 *
 * The file named by FAKE_NVML_STATE has lines "key value"; it is read anew at every call, so a test changes
 * the machine by writing it. "N.thing" is a reading of GPU N, "N.thing.error" the nvmlReturn_t its call
 * returns instead. Signatures and numbers are nvml.h's. Compiled with -DOLD_DRIVER it lacks the functions
 * that came with newer drivers.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10 };

#define DEVICES 16
typedef struct { int index; } device_t;
typedef device_t *nvmlDevice_t;
static device_t devices[DEVICES];

typedef struct { int freed; unsigned registered; } event_set_t;
typedef struct { unsigned gpu, memory; } rates_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; int sensor, celsius; } temperature_t;
static event_set_t event_sets[64];
static int event_sets_made;
static int next_event;
static int initialised;

static int lookup(const char *key, char *value, size_t size) {
    char line[512];
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    int found = 0;
    size_t length = strlen(key);
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) == 0 && line[length] == ' ') {
            line[strcspn(line, "\n")] = 0;
            snprintf(value, size, "%s", line + length + 1);
            found = 1;
        }
    }
    fclose(file);
    return found;
}

static unsigned long long number(const char *key, unsigned long long otherwise) {
    char value[256];
    return lookup(key, value, sizeof value) ? strtoull(value, NULL, 0) : otherwise;
}

/* The error of a call on a device: the whole device's, then the reading's, and a missing reading is no error. */
static nvmlReturn_t failure(nvmlDevice_t device, const char *thing) {
    char key[128];
    nvmlReturn_t error;
    if (!initialised) return UNINITIALIZED;
    snprintf(key, sizeof key, "%d.error", device->index);
    error = (nvmlReturn_t)number(key, SUCCESS);
    if (error != SUCCESS) return error;
    snprintf(key, sizeof key, "%d.%s.error", device->index, thing);
    return (nvmlReturn_t)number(key, SUCCESS);
}

static unsigned long long reading(nvmlDevice_t device, const char *thing) {
    char key[128];
    snprintf(key, sizeof key, "%d.%s", device->index, thing);
    return number(key, 0);
}

static nvmlReturn_t text(nvmlDevice_t device, const char *thing, char *out, unsigned size) {
    char key[128];
    nvmlReturn_t error = failure(device, thing);
    if (error != SUCCESS) return error;
    snprintf(key, sizeof key, "%d.%s", device->index, thing);
    return lookup(key, out, size) ? SUCCESS : NOT_FOUND;
}

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    nvmlReturn_t error = (nvmlReturn_t)number("init.error", SUCCESS);
    (void)flags;
    if (error == SUCCESS) initialised++;
    return error;
}

nvmlReturn_t nvmlShutdown(void) {
    if (!initialised) return UNINITIALIZED;
    initialised--;
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t code) {
    static char said[32];
    snprintf(said, sizeof said, "fake error %d", code);
    return said;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialised) return UNINITIALIZED;
    *count = (unsigned)number("count", 0);
    return (nvmlReturn_t)number("count.error", SUCCESS);
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    if (index >= DEVICES) return INVALID_ARGUMENT;
    devices[index].index = (int)index;
    *device = &devices[index];
    return failure(*device, "handle");
}

/* MIG slices are devices beyond the count; "N.board" names the GPU they are a part of. */
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    char key[32], value[256];
    for (int index = 0; index < DEVICES; index++) {
        snprintf(key, sizeof key, "%d.uuid", index);
        if (lookup(key, value, sizeof value) && strcmp(value, uuid) == 0)
            return nvmlDeviceGetHandleByIndex_v2((unsigned)index, device);
    }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t slice, nvmlDevice_t *board) {
    return nvmlDeviceGetHandleByIndex_v2((unsigned)reading(slice, "board"), board);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned size) {
    return text(device, "name", name, size);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned size) {
    return text(device, "uuid", uuid, size);
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, rates_t *rates) {
    rates->gpu = (unsigned)reading(device, "utilization");
    rates->memory = (unsigned)reading(device, "memory.activity");
    return failure(device, "utilization");
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, memory_t *memory) {
    memory->total = reading(device, "memory.total");
    memory->used = reading(device, "memory.used");
    memory->free = memory->total - memory->used;
    return failure(device, "memory");
}

#ifdef OLD_DRIVER
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned *celsius) {
    (void)sensor;
    *celsius = (unsigned)reading(device, "temperature");
    return failure(device, "temperature");
}

nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons) {
    *reasons = reading(device, "reasons");
    return failure(device, "reasons");
}
#else
nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, temperature_t *out) {
    if (out->version != 0x100000C || out->sensor != 0) return INVALID_ARGUMENT;
    out->celsius = (int)reading(device, "temperature");
    return failure(device, "temperature");
}

nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons) {
    *reasons = reading(device, "reasons");
    return failure(device, "reasons");
}
#endif

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts) {
    *milliwatts = (unsigned)reading(device, "power");
    return failure(device, "power");
}

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, int domain, unsigned *megahertz) {
    const char *thing = domain == 1 ? "clock.sm" : domain == 2 ? "clock.memory" : "clock.other";
    *megahertz = (unsigned)reading(device, thing);
    return failure(device, thing);
}

nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, int type, int counter, unsigned long long *count) {
    const char *thing = type == 0 ? "ecc.corrected" : "ecc.uncorrected";
    if (counter != 0) return INVALID_ARGUMENT; /* volatile */
    *count = reading(device, thing);
    return failure(device, thing);
}

/* A GPU without the reading does not support it: PCIe replays and the totals over NVLink's links. */
static nvmlReturn_t supported(nvmlDevice_t device, const char *thing, unsigned long long *count) {
    char key[128], value[64];
    snprintf(key, sizeof key, "%d.%s", device->index, thing);
    if (!lookup(key, value, sizeof value)) return NOT_SUPPORTED;
    *count = strtoull(value, NULL, 0);
    return failure(device, thing);
}

nvmlReturn_t nvmlDeviceGetPcieReplayCounter(nvmlDevice_t device, unsigned *count) {
    unsigned long long found = 0;
    nvmlReturn_t error = supported(device, "pcie.replays", &found);
    *count = (unsigned)found;
    return error;
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type;
    nvmlReturn_t error;
    unsigned long long value;
} field_t;

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, field_t *fields) {
    for (int index = 0; index < count; index++) {
        field_t *field = &fields[index];
        const char *thing = field->field == 38   ? "nvlink.crc"
                            : field->field == 52 ? "nvlink.replay"
                            : field->field == 59 ? "nvlink.recovery"
                                                 : "nvlink.other";
        field->type = 3; /* unsigned long long */
        field->error = supported(device, thing, &field->value);
    }
    return failure(device, "fields");
}

nvmlReturn_t nvmlEventSetCreate(event_set_t **set) {
    if (!initialised) return UNINITIALIZED;
    *set = &event_sets[event_sets_made++ % 64];
    memset(*set, 0, sizeof **set);
    return (nvmlReturn_t)number("events.error", SUCCESS);
}

nvmlReturn_t nvmlEventSetFree(event_set_t *set) {
    if (set->freed) return INVALID_ARGUMENT;
    set->freed = 1;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types) {
    *types = 0x1f;
    return failure(device, "events");
}

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, event_set_t *set) {
    if (set->freed || types != 0x8) return INVALID_ARGUMENT;
    set->registered |= 1u << device->index;
    return failure(device, "events");
}

typedef struct {
    nvmlDevice_t device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event_t;

/* Event K of the machine is the line "event.K DEVICE XID"; each is handed out once. */
nvmlReturn_t nvmlEventSetWait_v2(event_set_t *set, event_t *event, unsigned milliseconds) {
    char key[32], value[64];
    int device;
    unsigned long long xid;
    if (set->freed) return INVALID_ARGUMENT;
    if (milliseconds != 0) abort(); /* the sampler must never wait */
    for (int index = 0; index < DEVICES; index++) {
        if (set->registered >> index & 1 && failure(&devices[index], "wait") != SUCCESS)
            return failure(&devices[index], "wait");
    }
    for (;;) {
        snprintf(key, sizeof key, "event.%d", next_event);
        if (!lookup(key, value, sizeof value)) return TIMEOUT;
        next_event++;
        if (sscanf(value, "%d %llu", &device, &xid) == 2 && set->registered >> device & 1) {
            event->device = &devices[device];
            event->type = 0x8;
            event->data = xid;
            return SUCCESS;
        }
    }
}
