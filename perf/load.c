/* Load for proxies, native so that its own cost is small and the same for whatever is measured.
 *
 *   load serve   PORT                                            serve all that follows
 *   load bulk    IP PORT STREAMS up|down SECONDS [PID ...]       move bytes one way
 *   load echo    IP PORT STREAMS BYTES SECONDS [PID ...]         one message there and back at a time
 *   load pace    IP PORT EVERY_MS BYTES SECONDS [PID ...]        the same on one stream, each so much after the last
 *   load connect IP PORT PARALLEL FIRST SECONDS [PID ...]        connect, one byte there and back, close
 *   load hold    IP PORT COUNT FIRST                             open, one byte there and back, keep
 *
 * An IP that ends in "+" is that of the first connection, and each later one goes to the next.
 * FIRST is the source address of the first connection, each later one has the next; "-" leaves the
 * choice to the kernel. A client first sends one byte that tells the server its part: E echo,
 * S sink, D drain (the server sends). What is measured begins after WARM_UP seconds; CPU seconds of
 * the processes PID are read at its two ends. Results go to stdout, one JSON object on one line.
 * `hold` prints {"held": COUNT} and ends when its stdin does. Any failure ends with status 1,
 * except those of `connect`, which are counted. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUFFER_BYTES (256 * 1024)
#define EVENTS 256
#define SENDS_PER_TURN 8 /* a source with one fast reader must not keep the others waiting */
#define ACCEPTS_PER_TURN 64
#define WARM_UP 0.3
#define NANO 1e-9

static char buffer[BUFFER_BYTES];
static const int on = 1;

static void die(const char *what) {
  fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * NANO;
}

static void *zeroed(size_t count, size_t size) {
  void *memory = calloc(count, size);
  if (!memory) die("out of memory");
  return memory;
}

static void allow_many_files(void) {
  struct rlimit limit;
  if (!getrlimit(RLIMIT_NOFILE, &limit)) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
}

static void watch(int set, int operation, int fd, uint32_t events, void *owner) {
  struct epoll_event event = {.events = events, .data.ptr = owner};
  if (epoll_ctl(set, operation, fd, &event)) die("epoll_ctl");
}

/* ---- What was measured ---- */

static double started, ends; /* of the measured part */
static int measuring;
static char **processes;
static int process_count;
static double *cpu_before;
static float *times; /* seconds each */
static size_t time_count, time_room;
static uint64_t bytes_moved, failures;

static void remember_time(double seconds) {
  if (!measuring) return;
  if (time_count == time_room) {
    time_room = time_room ? time_room * 2 : 1 << 16;
    times = realloc(times, time_room * sizeof *times);
    if (!times) die("out of memory");
  }
  times[time_count++] = (float)seconds;
}

/* CPU seconds of a process: all its threads, to the nanosecond, as the scheduler counts them. */
static double cpu_seconds(const char *process) {
  char path[600];
  snprintf(path, sizeof path, "/proc/%s/task", process);
  DIR *tasks = opendir(path);
  if (!tasks) die(path);
  double sum = 0;
  for (struct dirent *task; (task = readdir(tasks));) {
    unsigned long long ran = 0;
    if (task->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "/proc/%s/task/%s/schedstat", process, task->d_name);
    FILE *file = fopen(path, "r");
    if (!file) continue; /* that thread has just ended */
    if (fscanf(file, "%llu", &ran) == 1) sum += ran * NANO;
    fclose(file);
  }
  closedir(tasks);
  return sum;
}

static void plan_measuring(const char *seconds, char **pids, int count) {
  started = now() + WARM_UP;
  ends = started + atof(seconds);
  processes = pids;
  process_count = count;
  cpu_before = zeroed(count + 1, sizeof *cpu_before);
}

/* Tell whether to go on; begins to measure when it is time. */
static int go_on(void) {
  double time = now();
  if (!measuring && time >= started) {
    measuring = 1;
    bytes_moved = failures = 0;
    for (int i = 0; i < process_count; i++) cpu_before[i] = cpu_seconds(processes[i]);
    started = now();
  }
  return time < ends;
}

static int by_size(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static double percentile_us(double part) {
  return time_count ? times[(size_t)((time_count - 1) * part)] * 1e6 : 0;
}

static void report(uint64_t sources) {
  double seconds = now() - started;
  qsort(times, time_count, sizeof *times, by_size);
  printf("{\"seconds\": %.6f, \"bytes\": %llu, \"count\": %zu, \"failures\": %llu, ", seconds,
         (unsigned long long)bytes_moved, time_count, (unsigned long long)failures);
  printf("\"p50_us\": %.1f, \"p99_us\": %.1f, \"worst_us\": %.1f, \"sources\": %llu, \"cpu\": [",
         percentile_us(0.5), percentile_us(0.99), percentile_us(1), (unsigned long long)sources);
  for (int i = 0; i < process_count; i++)
    printf("%s%.6f", i ? ", " : "", cpu_seconds(processes[i]) - cpu_before[i]);
  printf("]}\n");
}

/* ---- The server ---- */

struct peer {
  int fd;
  char part; /* 0 until the first byte has come */
  char *rest; /* what could not be sent back yet */
  size_t rest_size, rest_sent;
};

static int server_set;

static void leave(struct peer *peer) {
  close(peer->fd);
  free(peer->rest);
  free(peer);
}

static void echo(struct peer *peer, const char *data, size_t size) {
  ssize_t sent = send(peer->fd, data, size, MSG_NOSIGNAL);
  if (sent < 0) sent = 0; /* full, or gone, which the next event tells */
  if ((size_t)sent == size) return;
  peer->rest_size = size - sent;
  peer->rest_sent = 0;
  peer->rest = zeroed(1, peer->rest_size);
  memcpy(peer->rest, data + sent, peer->rest_size);
  watch(server_set, EPOLL_CTL_MOD, peer->fd, EPOLLOUT, peer);
}

/* The three below return 0 when the connection is over. */

static int send_rest(struct peer *peer) {
  ssize_t sent = send(peer->fd, peer->rest + peer->rest_sent, peer->rest_size - peer->rest_sent, MSG_NOSIGNAL);
  if (sent < 0) return errno == EAGAIN;
  peer->rest_sent += sent;
  if (peer->rest_sent == peer->rest_size) {
    free(peer->rest);
    peer->rest = NULL;
    watch(server_set, EPOLL_CTL_MOD, peer->fd, EPOLLIN, peer);
  }
  return 1;
}

static int take(struct peer *peer) {
  ssize_t size = recv(peer->fd, buffer, BUFFER_BYTES, 0);
  if (size <= 0) return size < 0 && errno == EAGAIN;
  int skip = !peer->part;
  if (skip) {
    peer->part = buffer[0];
    if (peer->part == 'D') watch(server_set, EPOLL_CTL_MOD, peer->fd, EPOLLIN | EPOLLOUT, peer);
  }
  if (peer->part == 'E' && size > skip) echo(peer, buffer + skip, size - skip);
  return 1;
}

static int give(struct peer *peer) {
  for (int i = 0; i < SENDS_PER_TURN; i++)
    if (send(peer->fd, buffer, BUFFER_BYTES, MSG_NOSIGNAL) < 0) return errno == EAGAIN;
  return 1;
}

static void welcome(int listener) {
  for (int i = 0; i < ACCEPTS_PER_TURN; i++) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct peer *peer = zeroed(1, sizeof *peer);
    peer->fd = fd;
    watch(server_set, EPOLL_CTL_ADD, fd, EPOLLIN, peer);
  }
}

static void serve(int port) {
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) die("listen");
  server_set = epoll_create1(0);
  watch(server_set, EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
  struct epoll_event events[EVENTS];
  for (;;) {
    int count = epoll_wait(server_set, events, EVENTS, -1);
    for (int i = 0; i < count; i++) {
      struct peer *peer = events[i].data.ptr;
      if (!peer) {
        welcome(listener);
        continue;
      }
      int alive = !(events[i].events & EPOLLERR);
      if (alive && events[i].events & EPOLLOUT) alive = peer->rest ? send_rest(peer) : give(peer);
      if (alive && !peer->rest && events[i].events & (EPOLLIN | EPOLLHUP)) alive = take(peer);
      if (!alive) leave(peer);
    }
  }
}

/* ---- The client ---- */

static struct sockaddr_in target;
static int sweeps; /* whether each connection goes to the next address */
static uint32_t next_source; /* host order; 0: the kernel chooses */
static uint64_t sources_used;

static void aim(char **arguments) {
  target.sin_family = AF_INET;
  target.sin_port = htons(atoi(arguments[1]));
  char *end = strchr(arguments[0], '+');
  if ((sweeps = !!end)) *end = 0;
  if (inet_pton(AF_INET, arguments[0], &target.sin_addr) != 1) die("the target's address");
}

static void choose_sources(const char *first) {
  struct in_addr address;
  if (!strcmp(first, "-")) return;
  if (inet_pton(AF_INET, first, &address) != 1) die("the first source address");
  next_source = ntohl(address.s_addr);
}

static int dial(int flags) {
  int fd = socket(AF_INET, SOCK_STREAM | flags, 0);
  if (fd < 0) die("socket");
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (next_source) {
    struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(next_source++)};
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (void *)&source, sizeof source)) die("bind");
    sources_used++;
  }
  if (connect(fd, (void *)&target, sizeof target) && errno != EINPROGRESS) die("connect");
  if (sweeps) target.sin_addr.s_addr = htonl(ntohl(target.sin_addr.s_addr) + 1);
  return fd;
}

static int dial_as(char part) {
  int fd = dial(0);
  if (send(fd, &part, 1, MSG_NOSIGNAL) != 1) die("send");
  fcntl(fd, F_SETFL, O_NONBLOCK);
  return fd;
}

struct call {
  int fd;
  int said; /* connect: whether the byte is on its way */
  size_t got;
  double since;
};

static void bulk(int streams, int up) {
  int set = epoll_create1(0);
  struct call *calls = zeroed(streams, sizeof *calls);
  for (int i = 0; i < streams; i++) {
    calls[i].fd = dial_as(up ? 'S' : 'D');
    watch(set, EPOLL_CTL_ADD, calls[i].fd, up ? EPOLLOUT : EPOLLIN, &calls[i]);
  }
  struct epoll_event events[EVENTS];
  while (go_on()) {
    int count = epoll_wait(set, events, EVENTS, 100);
    for (int i = 0; i < count; i++) {
      int fd = ((struct call *)events[i].data.ptr)->fd;
      ssize_t size = up ? send(fd, buffer, BUFFER_BYTES, MSG_NOSIGNAL) : recv(fd, buffer, BUFFER_BYTES, 0);
      if (size > 0) bytes_moved += size;
      else if (!size || errno != EAGAIN) die("a connection broke");
    }
  }
}

static double pause_seconds; /* from one message to the next */

static void say(struct call *call, size_t size) {
  double left = call->since + pause_seconds - now();
  if (left > 0) usleep(left * 1e6);
  call->got = 0;
  call->since = now();
  if (send(call->fd, buffer, size, MSG_NOSIGNAL) != (ssize_t)size) die("send");
}

static void there_and_back(int streams, size_t size) {
  int set = epoll_create1(0);
  struct call *calls = zeroed(streams, sizeof *calls);
  for (int i = 0; i < streams; i++) {
    calls[i].fd = dial_as('E');
    watch(set, EPOLL_CTL_ADD, calls[i].fd, EPOLLIN, &calls[i]);
    say(&calls[i], size);
  }
  struct epoll_event events[EVENTS];
  while (go_on()) {
    int count = epoll_wait(set, events, EVENTS, 100);
    for (int i = 0; i < count; i++) {
      struct call *call = events[i].data.ptr;
      ssize_t got = recv(call->fd, buffer, size - call->got, 0);
      if (got <= 0) {
        if (got < 0 && errno == EAGAIN) continue;
        die("a connection broke");
      }
      call->got += got;
      if (call->got < size) continue;
      remember_time(now() - call->since);
      say(call, size);
    }
  }
}

static void begin(struct call *call, int set) {
  call->since = now();
  call->said = 0;
  call->fd = dial(SOCK_NONBLOCK);
  watch(set, EPOLL_CTL_ADD, call->fd, EPOLLOUT, call);
}

/* Take the next step of one call; returns 0 when it is over. */
static int step(struct call *call, int set) {
  char byte;
  if (call->said) {
    if (recv(call->fd, &byte, 1, 0) == 1) remember_time(now() - call->since);
    else failures++;
    return 0;
  }
  if (send(call->fd, "E.", 2, MSG_NOSIGNAL) != 2) {
    failures++;
    return 0;
  }
  call->said = 1;
  watch(set, EPOLL_CTL_MOD, call->fd, EPOLLIN, call);
  return 1;
}

static void connect_again_and_again(int parallel) {
  int set = epoll_create1(0);
  struct call *calls = zeroed(parallel, sizeof *calls);
  for (int i = 0; i < parallel; i++) begin(&calls[i], set);
  struct epoll_event events[EVENTS];
  while (go_on()) {
    int count = epoll_wait(set, events, EVENTS, 100);
    for (int i = 0; i < count; i++) {
      struct call *call = events[i].data.ptr;
      if (step(call, set)) continue;
      close(call->fd);
      begin(call, set);
    }
  }
}

static void hold(int count) {
  char byte;
  for (int i = 0; i < count; i++) {
    int fd = dial(0);
    if (send(fd, "E.", 2, MSG_NOSIGNAL) != 2 || recv(fd, &byte, 1, 0) != 1) die("a connection broke");
  }
  printf("{\"held\": %d, \"sources\": %llu}\n", count, (unsigned long long)sources_used);
  fflush(stdout);
  while (read(0, &byte, 1) > 0) continue;
}

int main(int count, char **words) {
  const char *command = count > 2 ? words[1] : "";
  signal(SIGPIPE, SIG_IGN);
  allow_many_files();
  if (!strcmp(command, "serve")) serve(atoi(words[2]));
  if (count < 6) {
    fprintf(stderr, "usage: see the top of load.c\n");
    return 2;
  }
  aim(words + 2);
  if (!strcmp(command, "hold")) {
    choose_sources(words[5]);
    hold(atoi(words[4]));
    return 0;
  }
  if (count < 7) return 2;
  plan_measuring(words[6], words + 7, count - 7);
  if (!strcmp(command, "bulk")) bulk(atoi(words[4]), !strcmp(words[5], "up"));
  else if (!strcmp(command, "echo")) there_and_back(atoi(words[4]), atoi(words[5]));
  else if (!strcmp(command, "pace")) {
    pause_seconds = atof(words[4]) / 1000;
    there_and_back(1, atoi(words[5]));
  } else if (!strcmp(command, "connect")) {
    choose_sources(words[5]);
    connect_again_and_again(atoi(words[4]));
  } else return 2;
  report(sources_used);
  return 0;
}
