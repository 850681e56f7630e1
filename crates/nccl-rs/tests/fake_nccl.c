// A stand-in for NCCL on hosts without a GPU: one rank, host memory, results set by the test.
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef struct { char bytes[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;

int fake_version = 22809, fake_polls = 3, fake_code = 0, fake_aborts = 0, fake_destroys = 0, fake_finalizes = 0;
int fake_depth = 0, fake_calls = 0;
char fake_log[4096];
static char last[64] = "";

static const int in_progress = 7;
static int polls_left = 0;

static void record(const char* call, size_t count, int type, int extra, void* stream) {
  size_t at = strlen(fake_log);
  snprintf(fake_log + at, sizeof(fake_log) - at, "%s n=%zu type=%d x=%d stream=%zu\n", call, count, type, extra, (size_t)stream);
  fake_calls++;
}
static size_t width(int type) { return type == 9 ? 2 : type == 7 ? 4 : 8; }
static void copy(void* to, const void* from, size_t count, int type) {
  if (to != from) memcpy(to, from, count * width(type));
}

int ncclGetVersion(int* out) { *out = fake_version; return 0; }
int ncclGetUniqueId(Id* id) { memset(id, 5, sizeof *id); return 0; }
const char* ncclGetErrorString(int code) { return code == 5 ? "invalid usage" : code == 6 ? "remote process exited" : "other"; }
const char* ncclGetLastError(void* comm) { return comm ? last : ""; }

int ncclCommInitRankConfig(void** comm, int ranks, Id id, int rank, Config* config) {
  if (config->size != 24 || config->magic != 0xcafebeef || config->blocking != 0 || id.bytes[127] != 5) return 4;
  if (ranks == 99) return 5;  // no communicator is created
  *comm = last;
  polls_left = fake_polls;
  return in_progress;
}
int ncclCommGetAsyncError(void* comm, int* out) {
  (void)comm;
  if (polls_left > 0) { polls_left--; *out = in_progress; return 0; }
  if (polls_left < 0) { *out = in_progress; return 0; }
  *out = fake_code;
  if (fake_code) strcpy(last, "socket closed\n");
  return 0;
}
int ncclCommFinalize(void* comm) { (void)comm; fake_finalizes++; polls_left = fake_polls; return in_progress; }
int ncclCommDestroy(void* comm) { (void)comm; fake_destroys++; return 0; }
int ncclCommAbort(void* comm) { (void)comm; fake_aborts++; return 0; }

int ncclAllReduce(const void* a, void* b, size_t n, int type, int op, void* c, void* s) {
  (void)c; record("all_reduce", n, type, op, s); copy(b, a, n, type); return fake_depth == 1 ? in_progress : 5;
}
int ncclReduceScatter(const void* a, void* b, size_t n, int type, int op, void* c, void* s) {
  (void)c; record("reduce_scatter", n, type, op, s); copy(b, a, n, type); return fake_depth == 1 ? 0 : 5;
}
int ncclAllGather(const void* a, void* b, size_t n, int type, void* c, void* s) {
  (void)c; record("all_gather", n, type, 0, s); copy(b, a, n, type); return fake_depth == 1 ? 0 : 5;
}
int ncclBroadcast(const void* a, void* b, size_t n, int type, int root, void* c, void* s) {
  (void)c; record("broadcast", n, type, root, s); copy(b, a, n, type); return root == 0 ? 0 : 5;
}
int ncclSend(void* a, size_t n, int type, int peer, void* c, void* s) { (void)a; (void)c; record("send", n, type, peer, s); return 0; }
int ncclRecv(void* a, size_t n, int type, int peer, void* c, void* s) { (void)a; (void)c; record("recv", n, type, peer, s); return 0; }
int ncclGroupStart(void) { fake_depth++; return 0; }
int ncclGroupEnd(void) { fake_depth--; polls_left = fake_polls; return in_progress; }
