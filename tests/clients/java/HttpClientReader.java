// Java's own HttpClient: a streamed chat, an error, an answer that is cut, and a resume by Last-Event-ID.

import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;

public class HttpClientReader {
    static final String URL = System.getenv("STREAMD_URL");
    static final String CUT_URL = System.getenv("CUT_URL");
    static final HttpClient CLIENT = HttpClient.newHttpClient(); // offers h2c on each request
    static final Pattern CONTENT = Pattern.compile("\"content\":\"((?:[^\"\\\\]|\\\\.)*)\"");

    static void tell(String step, String value) {
        System.out.println("[\"" + step + "\", \"" + value.replace("\\", "\\\\").replace("\"", "\\\"") + "\"]");
    }

    static HttpRequest.Builder chat(String url, boolean stream) {
        String body = "{\"model\": \"mock-llm\", \"stream\": " + stream
            + ", \"messages\": [{\"role\": \"user\", \"content\": \"Tell me about rivers.\"}]}";
        return HttpRequest.newBuilder(URI.create(url + "/v1/chat/completions"))
            .header("Content-Type", "application/json")
            .POST(HttpRequest.BodyPublishers.ofString(body));
    }

    /** The text in a chunk or an answer, without its escapes. */
    static String textOf(String json) {
        Matcher found = CONTENT.matcher(json);
        return found.find() ? found.group(1).replace("\\\"", "\"").replace("\\\\", "\\") : "";
    }

    /** Add the texts of the lines to `said`, and the id of each event whose data came to `ids`. Throws where the body breaks off. */
    static void read(HttpResponse<Stream<String>> answer, StringBuilder said, List<String> ids) {
        String[] id = {""};
        answer.body().forEach(line -> {
            if (line.startsWith("id: ")) {
                id[0] = line.substring(4);
            } else if (line.startsWith("data: ") && (line.endsWith("}") || line.endsWith("[DONE]"))) {
                said.append(textOf(line));
                ids.add(id[0]);
            }
        });
    }

    static HttpResponse<Stream<String>> send(HttpRequest request) throws IOException, InterruptedException {
        return CLIENT.send(request, HttpResponse.BodyHandlers.ofLines());
    }

    public static void main(String[] arguments) throws Exception {
        tell("version", "Java " + System.getProperty("java.version"));
        HttpResponse<String> whole = CLIENT.send(chat(URL, false).build(), HttpResponse.BodyHandlers.ofString());
        tell("whole", textOf(whole.body()));
        StringBuilder said = new StringBuilder();
        read(send(chat(URL, true).build()), said, new ArrayList<>());
        tell("stream", said.toString());
        tell("refused", "status " + send(chat(URL, true).header("X-Mock-Fault", "status=429").build()).statusCode());
        try {
            read(send(chat(URL, true).header("X-Mock-Fault", "break-fin=3").build()), new StringBuilder(), new ArrayList<>());
            tell("cut", "no error");
        } catch (Exception error) {
            tell("cut", error.toString());
        }
        resume();
    }

    static void resume() throws Exception {
        StringBuilder said = new StringBuilder();
        List<String> ids = new ArrayList<>();
        try {
            read(send(chat(CUT_URL, true).header("X-Stream-Detach-Grace", "60").build()), said, ids);
            tell("resume", "nothing broke");
        } catch (Exception error) {
            String last = ids.get(ids.size() - 1);
            URI stream = URI.create(CUT_URL + "/v1/streams/" + last.substring(0, last.lastIndexOf(':')));
            read(send(HttpRequest.newBuilder(stream).header("Last-Event-ID", last).build()), said, ids);
            tell("resume", said.toString());
            tell("broken by", error.toString());
        }
    }
}
