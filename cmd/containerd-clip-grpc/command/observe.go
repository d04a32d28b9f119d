package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const unixScheme = "unix://"

// validateObserved checks where metrics and profiles are served: what they say
// is not for other machines, and profiles are for root alone.
func (c config) validateObserved() error {
	if c.LogFormat != string(log.TextFormat) && c.LogFormat != string(log.JSONFormat) {
		return fmt.Errorf("log_format %q must be %q or %q", c.LogFormat, log.TextFormat, log.JSONFormat)
	}
	if d := c.Debug.Address; d != "" && !strings.HasPrefix(d, unixScheme+"/") {
		return fmt.Errorf("debug.address %q must be the path of a socket behind unix://", d)
	}
	m := c.Metrics.Address
	if m == "" || strings.HasPrefix(m, unixScheme+"/") {
		return nil
	}
	host, _, err := net.SplitHostPort(m)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("metrics.address %q must be the path of a socket behind unix://, or a loopback address with a port, such as 127.0.0.1:9254", m)
	}
	return nil
}

// gatherers are the metrics of this process and of the one that watches.
func (c config) gatherers(own []prometheus.Collector) prometheus.Gatherers {
	registry := prometheus.NewRegistry()
	registry.MustRegister(own...)
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	all := prometheus.Gatherers{registry}
	if len(c.Watch.Rules) > 0 {
		all = append(all, watcherMetrics(c.watcherSocket()))
	}
	return all
}

// watcherSocket is where the process that watches serves its metrics for the
// daemon.
func (c config) watcherSocket() string { return c.Address + ".watch" }

// watcherMetrics asks the process that watches. While it is being started again
// there are none.
func watcherMetrics(socket string) prometheus.GathererFunc {
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	return func() (all []*dto.MetricFamily, err error) {
		resp, err := client.Get("http://watcher/metrics")
		if err != nil {
			return nil, nil
		}
		defer resp.Body.Close()
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(resp.Body)
		for _, f := range families {
			all = append(all, f)
		}
		return all, err
	}
}

// observe serves metrics and profiles, where c says so, until stop is called.
func (c config) observe(ctx context.Context, g prometheus.Gatherer) (stop func(), err error) {
	metrics := http.NewServeMux()
	metrics.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	profiles := http.NewServeMux()
	profiles.HandleFunc("/debug/pprof/", pprof.Index)
	profiles.HandleFunc("/debug/pprof/profile", pprof.Profile)
	profiles.HandleFunc("/debug/pprof/trace", pprof.Trace)
	profiles.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	var stops []func()
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	for _, o := range []struct {
		address string
		handler http.Handler
	}{{c.Metrics.Address, metrics}, {c.Debug.Address, profiles}} {
		if o.address == "" {
			continue
		}
		s, err := serveHTTP(ctx, o.address, o.handler)
		if err != nil {
			stop()
			return nil, err
		}
		stops = append(stops, s)
	}
	return stop, nil
}

// serveHTTP serves at an address, until stop is called.
func serveHTTP(ctx context.Context, address string, h http.Handler) (stop func(), err error) {
	var l net.Listener
	if socket, ok := strings.CutPrefix(address, unixScheme); ok {
		l, err = listen(socket)
	} else {
		l, err = net.Listen("tcp", address)
	}
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", address, err)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).WithField("address", address).Error("no longer listening")
		}
	}()
	return func() {
		if err := server.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			log.G(ctx).WithError(err).WithField("address", address).Warn("cannot stop listening")
		}
		<-ended
	}, nil
}
