# Varnish (7.0 or later) in front of streamd, HTTP/1.1 on both sides; TLS ends in front of it.
# docs/REVERSE-PROXIES.md says why for each line; tests/proxies runs this file.
vcl 4.1;

backend streamd {
    .host = "127.0.0.1";
    .port = "8080";
    .connect_timeout = 5s;
    .first_byte_timeout = 600s;
    .between_bytes_timeout = 600s;
}

sub vcl_recv {
    if (req.url ~ "^/v1/") {
        # A pipe passes bytes on as they come, both ways, and hears at once of a reader that leaves; a pass doesn't.
        return (pipe);
    }
    return (synth(404));
}

sub vcl_pipe {
    # A pipe sees its first request alone: another on the same connection would go past this file.
    set bereq.http.Connection = "close";
}
