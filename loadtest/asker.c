/* asker PORT CONNECTIONS RATE WARM_S SECONDS HEAD: asks a server for one short stream after another over connections that
 * are kept, cheap enough to leave the machine to the server. RATE requests a second go out, each on the connection that
 * has been idle for longest; with RATE 0 each connection asks again as soon as its answer is complete. HEAD is "sdk" for
 * the fields that OpenAI's SDK for Python sends, or "short". An answer ends with its last chunk. Only requests of the window
 * count, which begins WARM_S after the start. Prints a line of JSON: complete answers and answers a second, others (refused
 * or broken off), requests that found no idle connection, and the time from a request to its first event. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS_MAX 4096
#define TAIL 7        /* "\r\n0\r\n\r\n" */
#define BUCKETS 100000 /* of 10 us: up to a second */

struct connection {
    int fd, next_idle;
    char tail[2 * TAIL];
    long long asked_ns;
    unsigned char busy, head_seen, event_seen;
};

static struct connection connections[CONNECTIONS_MAX];
static unsigned firsts[BUCKETS];
static int poll_fd, port, idle_first = -1, idle_last = -1;
static long complete, failed, late;
static long long window_from, window_to;
static char request[4096];
static int request_len;

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void write_request(const char *head) {
    static const char *body = "{\"model\":\"synthetic\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}";
    static const char *plain = "Accept: text/event-stream\r\n";
    static const char *sdk =
        "Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nAccept: application/json\r\n"
        "User-Agent: OpenAI/Python 2.8.1\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 2.8.1\r\n"
        "X-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
        "X-Stainless-Runtime-Version: 3.11.7\r\nAuthorization: Bearer sk-0123456789abcdef\r\nX-Stainless-Async: false\r\n"
        "x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n";
    request_len = snprintf(request, sizeof request,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%sContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
        port, strcmp(head, "sdk") ? plain : sdk, strlen(body), body);
}

static void be_idle(int index) {
    connections[index].next_idle = -1;
    if (idle_last < 0) idle_first = index;
    else connections[idle_last].next_idle = index;
    idle_last = index;
}

static int take_idle(void) {
    int index = idle_first;
    if (index < 0) return -1;
    idle_first = connections[index].next_idle;
    if (idle_first < 0) idle_last = -1;
    return index;
}

static void open_connection(int index) {
    struct connection *c = &connections[index];
    int one = 1;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (void *)&to, sizeof to)) { perror("asker: connect"); exit(1); }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = index};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &e);
    c->busy = 0;
}

static int in_window(long long ns) { return ns >= window_from && ns < window_to; }

static void ask(int index, long long now) {
    struct connection *c = &connections[index];
    c->busy = 1;
    c->head_seen = c->event_seen = 0;
    memset(c->tail, 0, sizeof c->tail);
    c->asked_ns = now;
    if (write(c->fd, request, request_len) != request_len) { perror("asker: write"); exit(1); }
}

static void failed_answer(int index) {
    struct connection *c = &connections[index];
    if (in_window(c->asked_ns)) failed++;
    close(c->fd);
    open_connection(index);
    be_idle(index);
}

static void readable(int index, int again) {
    static char data[1 << 16];
    struct connection *c = &connections[index];
    ssize_t n = read(c->fd, data, sizeof data);
    long long now = now_ns();
    if (n <= 0 || !c->busy) { failed_answer(index); return; }
    if (!c->head_seen) {
        c->head_seen = 1;
        if (n < 12 || memcmp(data + 8, " 200", 4)) { failed_answer(index); return; }
    }
    if (!c->event_seen && memmem(data, n, "data:", 5)) {
        c->event_seen = 1;
        long long bucket = (now - c->asked_ns) / 10000;
        if (in_window(c->asked_ns)) firsts[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    }
    int last = n < TAIL ? n : TAIL;
    memmove(c->tail, c->tail + last, TAIL - last);
    memcpy(c->tail + TAIL - last, data + n - last, last);
    if (memcmp(c->tail, "\r\n0\r\n\r\n", TAIL)) return;
    if (in_window(c->asked_ns)) complete++;
    c->busy = 0;
    if (again && now < window_to) ask(index, now);
    else be_idle(index);
}

static double quantile_ms(double q) {
    double all = 0, seen = 0;
    for (int b = 0; b < BUCKETS; b++) all += firsts[b];
    for (int b = 0; b < BUCKETS && all; b++)
        if ((seen += firsts[b]) >= all * q) return (b + 1) / 100.;
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 7) { fprintf(stderr, "usage: asker PORT CONNECTIONS RATE WARM_S SECONDS short|sdk\n"); return 2; }
    int count = atoi(argv[2]);
    double rate = atof(argv[3]), warm_s = atof(argv[4]), seconds = atof(argv[5]);
    if (count < 1 || count > CONNECTIONS_MAX) { fprintf(stderr, "asker: 1 to %d connections\n", CONNECTIONS_MAX); return 2; }
    port = atoi(argv[1]);
    write_request(argv[6]);
    poll_fd = epoll_create1(0);
    for (int i = 0; i < count; i++) { open_connection(i); be_idle(i); }
    long long start = now_ns(), asked = 0;
    window_from = start + warm_s * 1e9;
    window_to = window_from + seconds * 1e9;
    static struct epoll_event ready[CONNECTIONS_MAX];
    long long now = start, end = window_to + 2000000000LL;
    if (!rate) for (int index; (index = take_idle()) >= 0;) ask(index, now_ns());
    while (now < end) {
        long long due = rate && now < window_to ? start + asked * 1e9 / rate : end;
        struct timespec wait = {0, 0};
        if (due > now) { wait.tv_sec = (due - now) / 1000000000; wait.tv_nsec = (due - now) % 1000000000; }
        if (wait.tv_sec) wait = (struct timespec){1, 0};
        int n = epoll_pwait2(poll_fd, ready, CONNECTIONS_MAX, &wait, 0);
        for (int i = 0; i < n; i++) readable(ready[i].data.u32, !rate);
        now = now_ns();
        if (now >= window_to) {
            int busy = 0;
            for (int i = 0; i < count; i++) busy += connections[i].busy;
            if (!busy) break;
            continue;
        }
        for (; rate && now < window_to && now >= start + asked * 1e9 / rate; asked++) {
            int index = take_idle();
            if (index >= 0) ask(index, now);
            else late++;
        }
    }
    for (int i = 0; i < count; i++) failed += connections[i].busy;
    printf("{\"complete\": %ld, \"per_s\": %.1f, \"failed\": %ld, \"no_idle_connection\": %ld, \"first_event_ms\": {\"p50\": %.2f, \"p99\": %.2f}}\n",
        complete, complete / seconds, failed, late, quantile_ms(0.5), quantile_ms(0.99));
    return 0;
}
