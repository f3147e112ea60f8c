// Command requestinfo tells how Kubernetes reads a request: for each line "METHOD TARGET" of its input it prints a line
// of JSON, the RequestInfo, or the error of a request that net/http or Kubernetes refuses.
package main

import (
	"bufio"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"strings"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/server"
)

type reading struct {
	*request.RequestInfo
	Error string
}

func main() {
	resolver := server.NewRequestInfoResolver(&server.Config{
		LegacyAPIGroupPrefixes: sets.NewString(server.DefaultLegacyAPIPrefix),
	})
	lines := bufio.NewReader(os.Stdin)
	output := json.NewEncoder(os.Stdout)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		if err := output.Encode(read(resolver, strings.TrimSuffix(line, "\n"))); err != nil {
			log.Fatal(err)
		}
	}
}

// read has the line parsed by net/http, since Kubernetes is given what that made of the target.
func read(resolver request.RequestInfoResolver, line string) reading {
	message := line + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
	asked, err := http.ReadRequest(bufio.NewReader(strings.NewReader(message)))
	if err != nil {
		return reading{Error: err.Error()}
	}
	info, err := resolver.NewRequestInfo(asked)
	if err != nil {
		return reading{Error: err.Error()}
	}
	return reading{RequestInfo: info}
}
