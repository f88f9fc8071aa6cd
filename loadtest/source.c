/* source PORT INTERVAL_MS TOKENS [due]: a synthetic inference server that costs next to nothing.
 *
 * Each POST is answered with a chunked SSE stream of chat.completion.chunk events, one every INTERVAL_MS, TOKENS of them
 * (0: without end), then a finish_reason and [DONE]. A request may ask for something else: "interval_ms": N and
 * "tokens": N in its JSON body; with "silent_after": N the stream falls silent after N tokens and stays open. The text of
 * token k is "@<k>.<CLOCK_MONOTONIC in ns> ": a reader on this machine knows what is missing, what came twice, and how old
 * it is, also when texts were concatenated on the way. With "words": 1 it is a word instead, as long as a model's tokens
 * are. With "then_after": K and "then_ms": N the interval is N from token K on. Anything but a POST gets a short 200.
 *
 * A proxy that doesn't read blocks its stream here, which then goes on where it stopped: nothing is skipped. With "due" a
 * token's time is that at which it was due, and a stream that was blocked catches up, a token a millisecond: else a proxy that
 * holds its source back would hide how late its tokens are. Streams stand in a wheel of one-millisecond slots, so a token
 * costs a clock, a printf and a write. SIGTERM prints the sums. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FD_MAX 65536
#define SLOTS 16384       /* milliseconds; the longest interval */
#define REQUEST_MAX 16384 /* head and body of one request */
#define FRAME_MAX 640

struct stream {
    int prev, next, slot; /* its place in the wheel; slot -1: none */
    int interval, spread; /* milliseconds; spread: from the first token to the second */
    long sent, tokens, silent_after, words, then_after, then_ms;
    long due; /* the tick at which the next token is due */
    char *request; /* what came of a request so far */
    int request_len;
    char *unsent; /* the rest of a frame that the socket did not take */
    int unsent_len;
};

static struct stream streams[FD_MAX];
static int wheel[SLOTS];
static long tick, tokens_sent, streams_begun, blocked, aborted;
static int poll_fd, interval_default, by_due;
static long long start;
static long tokens_default;
static volatile sig_atomic_t stopping;

static void on_signal(int number) { (void)number; stopping = 1; }

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void wheel_in(int fd, long at) {
    struct stream *s = &streams[fd];
    s->slot = at % SLOTS;
    s->prev = 0;
    s->next = wheel[s->slot];
    if (s->next) streams[s->next].prev = fd;
    wheel[s->slot] = fd;
}

static void wheel_out(int fd) {
    struct stream *s = &streams[fd];
    if (s->slot < 0) return;
    if (s->prev) streams[s->prev].next = s->next;
    else wheel[s->slot] = s->next;
    if (s->next) streams[s->next].prev = s->prev;
    s->slot = -1;
}

static void watch(int fd, unsigned events, int how) {
    struct epoll_event e = {.events = events, .data.fd = fd};
    epoll_ctl(poll_fd, how, fd, &e);
}

static void gone(int fd) {
    struct stream *s = &streams[fd];
    if (s->slot >= 0 || s->unsent) aborted++;
    wheel_out(fd);
    free(s->request);
    free(s->unsent);
    *s = (struct stream){.slot = -1};
    close(fd);
}

/* 1: all of it is with the kernel; 0: the rest is kept and the stream waits; -1: the connection is gone. */
static int send_frame(int fd, const char *frame, int len) {
    struct stream *s = &streams[fd];
    ssize_t n = write(fd, frame, len);
    if (n == len) return 1;
    if (n < 0 && errno != EAGAIN) { gone(fd); return -1; }
    if (n < 0) n = 0;
    blocked++;
    s->unsent_len = len - n;
    s->unsent = malloc(s->unsent_len);
    memcpy(s->unsent, frame + n, s->unsent_len);
    wheel_out(fd);
    watch(fd, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
    return 0;
}

static void flush(int fd) {
    struct stream *s = &streams[fd];
    ssize_t n = write(fd, s->unsent, s->unsent_len);
    if (n < 0 && errno != EAGAIN) { gone(fd); return; }
    if (n < 0) return;
    memmove(s->unsent, s->unsent + n, s->unsent_len - n);
    s->unsent_len -= n;
    if (s->unsent_len) return;
    free(s->unsent);
    s->unsent = 0;
    watch(fd, EPOLLIN, EPOLL_CTL_MOD);
    if (s->sent != s->silent_after && (!s->tokens || s->sent <= s->tokens)) wheel_in(fd, !by_due ? tick + s->interval : s->due > tick ? s->due : tick + 1);
}

static void emit(int fd) {
    struct stream *s = &streams[fd];
    char event[FRAME_MAX / 2 + 64], frame[FRAME_MAX];
    const char *begin = "data: {\"id\":\"chatcmpl-8f2c1e7a9b\",\"object\":\"chat.completion.chunk\",\"created\":1763800000,"
                        "\"model\":\"synthetic\",\"choices\":[{\"index\":0,\"delta\":{";
    int last = s->tokens && s->sent == s->tokens, n, len;
    static const char *words[] = {" the", " stream", ",", " and", " each", " of", " its", " readers", " waits", ".", " A", " token", " is", " a", " few", " bytes"};
    if (!last && s->words) n = snprintf(event, sizeof event, "%s\"content\":\"%s\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n", begin, words[s->sent * 7 % 16]);
    else if (!last) n = snprintf(event, sizeof event, "%s\"content\":\"@%ld.%lld \"},\"logprobs\":null,\"finish_reason\":null}]}\n\n", begin, s->sent, by_due ? start + s->due * 1000000LL : now_ns());
    else n = snprintf(event, sizeof event, "%s},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n", begin);
    len = snprintf(frame, sizeof frame, "%x\r\n%s\r\n", n, event);
    if (last) len += snprintf(frame + len, sizeof frame - len, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    else tokens_sent++;
    wheel_out(fd);
    int taken = send_frame(fd, frame, len);
    if (taken < 0) return;
    int silent = ++s->sent == s->silent_after;
    if (s->sent == s->then_after) s->interval = s->then_ms;
    long wait = s->sent > 1 ? s->interval : s->spread;
    s->due += wait;
    if (!by_due) s->due = tick + wait;
    if (taken && !last && !silent) wheel_in(fd, s->due > tick ? s->due : tick + 1);
}

static long asked_for(const char *body, const char *key, long otherwise) {
    const char *at = strstr(body, key);
    return at ? strtol(at + strlen(key) + strspn(at + strlen(key), " :"), 0, 10) : otherwise;
}

static int whole_request(const char *request, int len) {
    const char *end = strstr(request, "\r\n\r\n"), *field;
    if (!end) return 0;
    if ((field = strcasestr(request, "\r\ncontent-length:")) && field < end)
        return len >= end + 4 - request + atol(field + 17);
    if ((field = strcasestr(request, "\r\ntransfer-encoding:")) && field < end)
        return len > 5 && !memcmp(request + len - 5, "0\r\n\r\n", 5);
    return 1;
}

static void begin(int fd) {
    struct stream *s = &streams[fd];
    const char *head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
                       "Transfer-Encoding: chunked\r\n\r\n";
    const char *other = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 27\r\n\r\n"
                        "{\"object\":\"list\",\"data\":[]}";
    int post = !memcmp(s->request, "POST", 4);
    s->interval = asked_for(s->request, "\"interval_ms\"", interval_default);
    if (s->interval < 1 || s->interval >= SLOTS) s->interval = interval_default;
    s->tokens = asked_for(s->request, "\"tokens\"", tokens_default);
    s->silent_after = asked_for(s->request, "\"silent_after\"", 0);
    s->words = asked_for(s->request, "\"words\"", 0);
    s->then_ms = asked_for(s->request, "\"then_ms\"", s->interval);
    s->then_after = s->then_ms < 1 || s->then_ms >= SLOTS ? 0 : asked_for(s->request, "\"then_after\"", 0);
    s->sent = 0;
    free(s->request);
    s->request = 0;
    s->request_len = 0;
    if (!post) { send_frame(fd, other, strlen(other)); return; }
    if (send_frame(fd, head, strlen(head)) != 1) return;
    /* The first token at once, so that the time to it is the way's; the others spread evenly over the interval. */
    s->due = tick;
    s->spread = 1 + streams_begun++ * 7919 % s->interval;
    emit(fd);
}

static void readable(int fd) {
    struct stream *s = &streams[fd];
    char scrap[4096];
    int busy = s->slot >= 0 || s->unsent;
    if (!busy && !s->request) s->request = malloc(REQUEST_MAX);
    ssize_t n = busy ? read(fd, scrap, sizeof scrap) : read(fd, s->request + s->request_len, REQUEST_MAX - 1 - s->request_len);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) { gone(fd); return; }
    if (busy) return;
    s->request_len += n;
    s->request[s->request_len] = 0;
    if (whole_request(s->request, s->request_len)) begin(fd);
    else if (s->request_len >= REQUEST_MAX - 1) gone(fd);
}

static void accept_all(int listener) {
    int one = 1;
    for (int fd; (fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0;) {
        if (fd >= FD_MAX) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        streams[fd] = (struct stream){.slot = -1};
        watch(fd, EPOLLIN, EPOLL_CTL_ADD);
    }
}

static int listen_on(int port) {
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (void *)&a, sizeof a) || listen(listener, 4096)) { perror("source"); exit(1); }
    return listener;
}

int main(int argc, char **argv) {
    by_due = argc == 5 && !strcmp(argv[4], "due");
    if (argc != 4 + by_due) { fprintf(stderr, "usage: source PORT INTERVAL_MS TOKENS [due]\n"); return 2; }
    interval_default = atoi(argv[2]);
    tokens_default = atol(argv[3]);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    struct rlimit rl;
    getrlimit(RLIMIT_NOFILE, &rl);
    rl.rlim_cur = rl.rlim_max;
    setrlimit(RLIMIT_NOFILE, &rl);
    poll_fd = epoll_create1(0);
    int listener = listen_on(atoi(argv[1]));
    watch(listener, EPOLLIN, EPOLL_CTL_ADD);
    static struct epoll_event ready[2048];
    start = now_ns();
    while (!stopping) {
        int n = epoll_wait(poll_fd, ready, 2048, 1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) { accept_all(listener); continue; }
            if (ready[i].events & EPOLLOUT && streams[fd].unsent) flush(fd);
            if (ready[i].events & ~EPOLLOUT) readable(fd);
        }
        for (long now = (now_ns() - start) / 1000000; tick < now; tick++)
            for (int fd = wheel[tick % SLOTS], next; fd; fd = next) {
                next = streams[fd].next;
                emit(fd);
            }
    }
    fprintf(stderr, "{\"streams\": %ld, \"tokens_sent\": %ld, \"blocked\": %ld, \"aborted\": %ld}\n", streams_begun, tokens_sent, blocked, aborted);
    return 0;
}
