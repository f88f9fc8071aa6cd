/* relay_floor PORT UPSTREAM_PORT: the least that a relay can do on this kernel. Not a proxy: it looks at nothing.
 *
 * One epoll loop. Each connection gets one of its own to 127.0.0.1:UPSTREAM_PORT, and what one side sends is written to the
 * other as it was read: a wait, a read and a write for each token, and no byte in between is touched. No server that
 * parses, counts or keeps anything can be much cheaper. What a side doesn't take at once is kept for it, and its other side
 * isn't read until it is gone. When one side ends, both do. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define FD_MAX 65536
#define READ_MAX 65536

struct side {
    int other; /* its partner's descriptor */
    char *kept; /* what came for this side and was not taken */
    int kept_len;
};

static struct side sides[FD_MAX];
static int poll_fd;

static void watch(int fd, unsigned events, int how) {
    struct epoll_event e = {.events = events, .data.fd = fd};
    epoll_ctl(poll_fd, how, fd, &e);
}

static void end_pair(int fd) {
    int pair[] = {fd, sides[fd].other};
    for (int i = 0; i < 2; i++) {
        free(sides[pair[i]].kept);
        sides[pair[i]] = (struct side){0};
        close(pair[i]);
    }
}

static void pass_on(int fd) {
    static char data[READ_MAX];
    int to = sides[fd].other;
    ssize_t n = read(fd, data, sizeof data), w;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0 || sides[to].kept) { end_pair(fd); return; } /* kept: this side isn't read, so it has broken */
    w = write(to, data, n);
    if (w == n) return;
    if (w < 0 && errno != EAGAIN && errno != ENOTCONN) { end_pair(fd); return; }
    if (w < 0) w = 0;
    sides[to].kept_len = n - w;
    sides[to].kept = malloc(n - w);
    memcpy(sides[to].kept, data + w, n - w);
    watch(fd, 0, EPOLL_CTL_MOD);
    watch(to, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
}

static void flush(int fd) {
    struct side *s = &sides[fd];
    ssize_t n = write(fd, s->kept, s->kept_len);
    if (n < 0 && errno != EAGAIN) { end_pair(fd); return; }
    if (n < 0) return;
    memmove(s->kept, s->kept + n, s->kept_len - n);
    if ((s->kept_len -= n)) return;
    free(s->kept);
    s->kept = 0;
    watch(fd, EPOLLIN, EPOLL_CTL_MOD);
    watch(s->other, EPOLLIN, EPOLL_CTL_MOD);
}

static struct sockaddr_in loopback(int port) {
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static void accept_all(int listener, int upstream_port) {
    struct sockaddr_in a = loopback(upstream_port);
    int one = 1;
    for (int fd; (fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0;) {
        int up = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        if (up < 0 || up >= FD_MAX || fd >= FD_MAX) { close(fd); if (up >= 0) close(up); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(up, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        connect(up, (void *)&a, sizeof a); /* in progress: what is written before it stands is kept */
        sides[fd] = (struct side){.other = up};
        sides[up] = (struct side){.other = fd};
        watch(fd, EPOLLIN, EPOLL_CTL_ADD);
        watch(up, EPOLLIN, EPOLL_CTL_ADD);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: relay_floor PORT UPSTREAM_PORT\n"); return 2; }
    signal(SIGPIPE, SIG_IGN);
    struct rlimit rl;
    getrlimit(RLIMIT_NOFILE, &rl);
    rl.rlim_cur = rl.rlim_max;
    setrlimit(RLIMIT_NOFILE, &rl);
    poll_fd = epoll_create1(0);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = loopback(atoi(argv[1]));
    if (bind(listener, (void *)&a, sizeof a) || listen(listener, 4096)) { perror("relay_floor"); return 1; }
    watch(listener, EPOLLIN, EPOLL_CTL_ADD);
    static struct epoll_event ready[1024];
    for (;;) {
        int n = epoll_wait(poll_fd, ready, 1024, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) { accept_all(listener, atoi(argv[2])); continue; }
            if (!sides[fd].other) continue; /* ended in this round */
            if (sides[fd].kept && ready[i].events & EPOLLOUT) flush(fd);
            else if (ready[i].events & ~EPOLLOUT) pass_on(fd);
        }
    }
}
