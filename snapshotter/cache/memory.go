package cache

import (
	"container/list"
	"sync"
)

// memory holds spans that could not be stored, the latest memorySize bytes of
// them. The zero value is empty.
type memory struct {
	mu    sync.Mutex // guards the fields below
	size  int
	order list.List // of *memorySpan, the oldest first
	spans map[memoryKey]*list.Element
}

type memoryKey struct {
	layer *Layer
	span  int
}

type memorySpan struct {
	memoryKey
	bytes []byte
}

const memorySize = 32 << 20

func (m *memory) get(l *Layer, span int) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e, ok := m.spans[memoryKey{l, span}]; ok {
		return e.Value.(*memorySpan).bytes
	}
	return nil
}

// add keeps b, which it owns from now on.
func (m *memory) add(l *Layer, span int, b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := memoryKey{l, span}
	if _, ok := m.spans[key]; ok {
		return
	}
	if m.spans == nil {
		m.spans = map[memoryKey]*list.Element{}
	}
	m.spans[key] = m.order.PushBack(&memorySpan{key, b})
	m.size += len(b)
	for m.size > memorySize {
		m.dropLocked(m.order.Front())
	}
}

// forget drops all spans of a layer.
func (m *memory) forget(l *Layer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for e := m.order.Front(); e != nil; {
		next := e.Next()
		if e.Value.(*memorySpan).layer == l {
			m.dropLocked(e)
		}
		e = next
	}
}

func (m *memory) dropLocked(e *list.Element) {
	s := m.order.Remove(e).(*memorySpan)
	m.size -= len(s.bytes)
	delete(m.spans, s.memoryKey)
}
