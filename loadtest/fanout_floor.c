/* fanout_floor PORT INTERVAL_MS READERS: the least that a fan-out can do on this kernel. Not a server: it reads no request.
 *
 * Whoever connects gets a response head at its first byte. A second after the READERS-th has, an event is made every
 * INTERVAL_MS and written to all, one after the other: one send() each, the same bytes, nothing kept for anybody. An event
 * is as large as one that streamd sends for a published chunk: an id line, JSON, and chunk framing around it; its text is
 * "@<k>.<CLOCK_MONOTONIC in ns> " as in source.c. A reader that doesn't take one whole is closed. */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FD_MAX 65536
#define FRAME_MAX 640

static int readers[FD_MAX], reader_count, poll_fd;
static char greeted[FD_MAX];

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void watch(int fd, int how) {
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(poll_fd, how, fd, &e);
}

static void gone(int fd) {
    for (int i = 0; i < reader_count; i++)
        if (readers[i] == fd) { readers[i] = readers[--reader_count]; break; }
    greeted[fd] = 0;
    close(fd);
}

static void readable(int fd) {
    static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                               "Cache-Control: no-cache, no-transform\r\nTransfer-Encoding: chunked\r\n\r\n";
    char request[4096];
    if (read(fd, request, sizeof request) <= 0) { gone(fd); return; }
    if (greeted[fd]) return;
    greeted[fd] = 1;
    readers[reader_count++] = fd;
    if (send(fd, head, sizeof head - 1, MSG_NOSIGNAL) < 0) gone(fd);
}

static void accept_all(int listener) {
    int one = 1;
    for (int fd; (fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0;) {
        if (fd >= FD_MAX) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(fd, EPOLL_CTL_ADD);
    }
}

static void fan_out(long k) {
    char event[FRAME_MAX / 2 + 64], frame[FRAME_MAX];
    int n = snprintf(event, sizeof event, "id: fanout:Ab3dE6:%ld\ndata: {\"id\":\"chatcmpl-8f2c1e7a9b\",\"object\":"
        "\"chat.completion.chunk\",\"created\":1763800000,\"model\":\"synthetic\",\"choices\":[{\"index\":0,\"delta\":"
        "{\"content\":\"@%ld.%lld \"},\"finish_reason\":null}]}\n\n", k + 1, k, now_ns());
    int len = snprintf(frame, sizeof frame, "%x\r\n%s\r\n", n, event);
    for (int i = reader_count - 1; i >= 0; i--)
        if (send(readers[i], frame, len, MSG_NOSIGNAL) != len) gone(readers[i]);
}

int main(int argc, char **argv) {
    if (argc != 4) { fprintf(stderr, "usage: fanout_floor PORT INTERVAL_MS READERS\n"); return 2; }
    long long interval_ns = atol(argv[2]) * 1000000LL, due_ns = 0;
    int wanted = atoi(argv[3]), one = 1;
    struct rlimit rl;
    getrlimit(RLIMIT_NOFILE, &rl);
    rl.rlim_cur = rl.rlim_max;
    setrlimit(RLIMIT_NOFILE, &rl);
    poll_fd = epoll_create1(0);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (void *)&a, sizeof a) || listen(listener, 4096)) { perror("fanout_floor"); return 1; }
    watch(listener, EPOLL_CTL_ADD);
    static struct epoll_event ready[1024];
    for (long k = 0;;) {
        long long left_ms = due_ns ? (due_ns - now_ns() + 999999) / 1000000 : 1000;
        int n = epoll_wait(poll_fd, ready, 1024, left_ms < 0 ? 0 : left_ms);
        for (int i = 0; i < n; i++) {
            if (ready[i].data.fd == listener) accept_all(listener);
            else readable(ready[i].data.fd);
        }
        if (!due_ns && reader_count >= wanted) due_ns = now_ns() + 1000000000LL;
        if (due_ns && now_ns() >= due_ns) {
            fan_out(k++);
            due_ns += interval_ns;
        }
    }
}
